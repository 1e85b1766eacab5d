"""How fast a model runs, beside this machine's limits and beside other tools."""

from posttrain.bench.verb import bench

__all__ = ["bench"]

"""The catalogue: published methods as compositions of this library's parts, with their claims tested.

One file for each paper, with a `PAPER` in it. `posttrain papers` lists them with what was measured;
`posttrain reproduce` measures.
"""

from posttrain.papers.verb import papers, reproduce

__all__ = ["papers", "reproduce"]

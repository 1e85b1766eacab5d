"""Quantize a model: stream its blocks, solve each layer, write a checkpoint strangers can load."""

from posttrain.quantize.budget import scan
from posttrain.quantize.pipeline import quantize
from posttrain.quantize.recipe import QuantRecipe, load_recipe, shipped_recipes

__all__ = ["QuantRecipe", "load_recipe", "quantize", "scan", "shipped_recipes"]

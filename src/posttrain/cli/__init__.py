"""The command line: one thin file per verb that parses, calls the public function and prints.

A verb file has a docstring (its help: summary, description, examples), `arguments(parser)`,
`call(args) -> dict` and `show(result) -> str`. Heavy imports happen inside `call`.
"""

from posttrain.cli.main import main

__all__ = ["main"]

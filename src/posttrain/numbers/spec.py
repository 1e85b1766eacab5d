"""`Spec`: the frozen value that names a number format with its scales, and its text form.

    spec   := grid [@rounding] [ | factor { * factor } ]
    factor := scale / partition [^power]
    scale  := grid [ [lo..hi] ] [.rule]  |  ( spec [, offset=mean] )

Examples: `int6 | fp16/g64`, `e2m1 | e4m3/g16 * fp32/tensor`, `nf4 | (dyn8 | fp32/g256,
offset=mean)/flat64`, `int8 | fp32/row^0.15 * fp32/col^0.85`, `int4@sr | pow2[0..3].floor/col *
fp32/tensor`. The scale of an element is the product of its factors, written finest first.

rounding: how elements round; see `rounding.ROUNDINGS`.
rule: how a factor on a power-of-two grid picks its exponent; see `SCALE_RULES`. Factors on other
    grids round to nearest even.
[lo..hi]: bounds on the shift k of a power-of-two factor 2^-k below a coarser factor.
power: the factor is (absmax / top)^power; the powers of a chain sum to 1 (CrossQuant).
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import lru_cache
from itertools import pairwise
from math import prod
from typing import NoReturn

from posttrain.errors import UserError
from posttrain.numbers.grids import GRIDS, Grid
from posttrain.numbers.partition import PARTITION_EXAMPLES, Partition, matrix_shape
from posttrain.numbers.presets import PRESETS
from posttrain.numbers.rounding import ROUNDINGS

SCALE_RULES: dict[str, str] = {
    "floor": "2^(floor(log2 absmax) - floor(log2 top)), the OCP MX rule; of a shift: k rounds down",
    "ceil": "2^ceil(log2(absmax / top)): never clips; of a shift: k rounds up",
    "nearest": "2^round(log2(absmax / top)); of a shift: k rounds to nearest",
}
# Other spellings in use, read but never written.
_ALIASES = {"near": "rne", "uint8z": "int8z", "uint4z": "int4z", "redchan": "col"}
# What decides codes or scales from data: named in a recipe, because it is not part of the format.
_SOLVERS = ("gptq", "adaround", "ste", "static", "learned")


@dataclass(frozen=True)
class Factor:
    """One factor of the scale: a grid (or a nested Spec) over a partition."""

    grid_name: str
    partition: Partition
    rule: str = "rne"
    power: float = 1.0
    limit: tuple[int, int] | None = None
    nested: "Spec | None" = None
    offset: str | None = None  # "mean": the nested tensor holds the difference from the mean

    @property
    def grid(self) -> Grid:
        """The grid the factor's stored values come from."""
        return GRIDS[self.grid_name]

    @property
    def top(self) -> float:
        """What the largest finer scale is mapped to on this grid; 1 if it has a scale of its own."""
        return 1.0 if self.nested else self.grid.top

    def stored_bits(self, matrix: tuple[int, int]) -> int:
        """Bits of this factor's stored values for a matrix [rows, K]."""
        counts = self.partition.counts(matrix)
        if self.nested is None:
            return prod(counts) * self.grid.bits
        return self.nested.stored_bits(counts) + (32 if self.offset else 0)

    def __str__(self) -> str:
        power = "" if self.power == 1.0 else f"^{self.power!r}"
        return f"{self._scale()}/{self.partition}{power}"

    def _scale(self) -> str:
        if self.nested is not None:
            offset = f", offset={self.offset}" if self.offset else ""
            return f"({self.nested}{offset})"
        limit = f"[{self.limit[0]}..{self.limit[1]}]" if self.limit else ""
        rule = "" if self.rule == "rne" else f".{self.rule}"
        return f"{self.grid_name}{limit}{rule}"


@dataclass(frozen=True)
class Spec:
    """An element grid, its rounding, and the chain of scale factors, finest first."""

    grid_name: str
    factors: tuple[Factor, ...] = ()
    rounding: str = "rne"

    def __post_init__(self) -> None:
        problem = _problem(self.grid_name, self.factors)
        if problem is not None:
            raise UserError(f"spec '{self}': {problem[1]}")

    @staticmethod
    def parse(text: "str | Spec") -> "Spec":
        """The Spec written as `text`: a preset name, the text form, or already a Spec.

        Raises UserError that shows the text with a caret under the wrong token.
        """
        if isinstance(text, Spec):
            return text
        if not isinstance(text, str):
            raise UserError(f"a spec is text or a Spec, not {type(text).__name__}")
        return _parse(text)

    def __str__(self) -> str:
        # A grid alone whose name is also a preset's (nf4) must not read as the preset.
        implied = self.rounding == "rne" and (self.factors or self.grid_name not in PRESETS)
        rounding = "" if implied else f"@{self.rounding}"
        factors = " * ".join(map(str, self.factors))
        return f"{self.grid_name}{rounding}" + (f" | {factors}" if factors else "")

    @property
    def grid(self) -> Grid:
        """The element grid."""
        return GRIDS[self.grid_name]

    @property
    def bits(self) -> int:
        """Bits of one element, without its share of the scales."""
        return self.grid.bits

    @property
    def flat(self) -> bool:
        """Whether blocks run over the flattened tensor."""
        return any(f.partition.flat for f in self.factors)

    @property
    def powered(self) -> bool:
        """Whether the chain is a weighted geometric mean (row^a * col^(1-a))."""
        return any(f.power != 1.0 for f in self.factors)

    def reciprocal(self, index: int) -> bool:
        """Whether factor `index` is stored as an encode scale: the chain divides by it.

        A per-tensor factor that normalises floating-point block scales is, as NVFP4 defines:
        s_enc = 448 * 6 / absmax, scale of a block = b / s_enc.
        """
        if index == 0 or self.powered or self.factors[index].nested is not None:
            return False
        finer, block = self.factors[index - 1], self.factors[index].partition
        return finer.nested is None and finer.grid.kind == "float" and str(block) == "tensor"

    @property
    def by_rows(self) -> bool:
        """Whether every row of a matrix has scales of its own: rows can be taken out and put
        together."""
        return all(
            factor.partition.rows == 1 and not factor.partition.flat and factor.nested is None
            for factor in self.factors
        )

    def matrix(self, shape: Sequence[int]) -> tuple[int, int]:
        """The [rows, K] a tensor of `shape` is partitioned as."""
        return matrix_shape(tuple(shape), self.flat)

    def stored_bits(self, shape: Sequence[int]) -> int:
        """Bits a tensor of `shape` takes when stored, with all scales and zero points."""
        matrix = self.matrix(shape)
        bits = prod(matrix) * self.bits + sum(f.stored_bits(matrix) for f in self.factors)
        if self.grid.zero_point:
            bits += prod(self.factors[0].partition.counts(matrix)) * self.bits
        return bits

    def bits_per_element(self, shape: Sequence[int]) -> float:
        """`stored_bits` over the number of elements; 0 for an empty tensor."""
        numel = prod(shape)
        return self.stored_bits(shape) / numel if numel else 0.0


def spec(text: str | Spec) -> Spec:
    """`Spec.parse` under a short name."""
    return Spec.parse(text)


def stored_bits(spec: str | Spec, shape: Sequence[int]) -> int:
    """Bits a tensor of `shape` takes when stored as `spec`, with all scales and zero points."""
    return Spec.parse(spec).stored_bits(shape)


# ---------------------------------------------------------------------- what a Spec may say


def _problem(grid_name: str, factors: Sequence[Factor]) -> tuple[int, str] | None:
    """What is wrong with a combination of valid parts: (index of the factor or -1, message)."""
    grid = GRIDS[grid_name]
    if not grid.signed:
        return -1, f"{grid_name} holds scales only; it has no sign"
    if grid.zero_point and not factors:
        return -1, f"{grid_name} needs a scale factor, such as '| fp16/g64', for its zero point"
    for i, factor in enumerate(factors):
        message = _factor_problem(factor, i + 1 < len(factors))
        if message:
            return i, message
    return _chain_problem(factors)


def _factor_problem(factor: Factor, has_coarser: bool) -> str | None:
    if factor.nested is not None:
        if factor.nested.rounding == "sr":
            return "a scale cannot round stochastically; it is fitted without a generator"
        return None
    if factor.grid.zero_point:
        return f"{factor.grid_name} has a zero point; as a scale, use a symmetric format"
    if factor.limit is not None and not (factor.grid.kind == "pow2" and has_coarser):
        return "[lo..hi] bounds the shift of a power-of-two factor below a coarser factor"
    return None


def _chain_problem(factors: Sequence[Factor]) -> tuple[int, str] | None:
    if any(f.power != 1.0 for f in factors):
        total = sum(f.power for f in factors)
        if abs(total - 1.0) > 1e-6:
            return len(factors) - 1, f"the powers of the factors must sum to 1, not {total:g}"
        if len({f.partition.flat for f in factors}) > 1:
            return len(factors) - 1, "flat blocks do not combine with rows and columns"
        return None
    for i, (fine, coarse) in enumerate(pairwise(factors)):
        if not fine.partition.inside(coarse.partition):
            return i + 1, (
                f"blocks '{fine.partition}' do not lie inside blocks '{coarse.partition}'; write "
                "the finer factor first, or give each factor a power that sums to 1"
            )
    return None


# ---------------------------------------------------------------------- reading the text form

_TOKEN = re.compile(r"\s*(?:(\.\.|[@|*/^(),=.\[\]+])|([A-Za-z_]\w*)|(\d+(?:\.\d+)?)|(\S))")


@dataclass(frozen=True)
class _Token:
    text: str
    start: int


@lru_cache(maxsize=1024)
def _parse(text: str) -> Spec:
    source = PRESETS.get(text.strip(), text)
    return _Parser(source).whole()


def _tokens(text: str) -> list[_Token]:
    found = [
        _Token(match.group(match.lastindex or 0), match.start(match.lastindex or 0))
        for match in _TOKEN.finditer(text)
        if match.lastindex
    ]
    return [*found, _Token("", len(text.rstrip()))]


class _Parser:
    """Recursive descent over the grammar at the top of this file."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.tokens = _tokens(text)
        self.at = 0

    # -- small steps

    @property
    def token(self) -> _Token:
        return self.tokens[self.at]

    def advance(self) -> _Token:
        token = self.token
        self.at += token.text != ""
        return token

    def take(self, text: str) -> bool:
        if self.token.text != text:
            return False
        self.at += 1
        return True

    def need(self, text: str, what: str) -> None:
        if not self.take(text):
            self.fail(self.token, f"expected {what}")

    def fail(self, token: _Token, message: str, known: Iterable[str] = ()) -> NoReturn:
        known = list(known)
        hint = ""
        if known:
            near = get_close_matches(token.text.lower(), known, n=1, cutoff=0.5)
            hint = (
                f"\ndid you mean '{near[0]}'?" if near else f"\nchoose one of: {', '.join(known)}"
            )
        carets = "^" * max(1, len(token.text))
        raise UserError(f"{message} in spec:\n  {self.text}\n  {' ' * token.start}{carets}{hint}")

    def name(self, what: str, known: Sequence[str]) -> str:
        token = self.advance()
        name = _ALIASES.get(token.text, token.text)
        if name in known:
            return name
        if token.text in _SOLVERS:
            self.fail(token, f"'{token.text}' is chosen in the recipe: it is not a {what}")
        found = f"unknown {what} '{token.text}'" if token.text else f"missing {what}"
        self.fail(token, found, known)

    # -- the grammar

    def whole(self) -> Spec:
        if not self.text.strip():
            raise UserError("empty spec; write one such as 'int6 | fp16/g64' or a preset: w6g64")
        self.refuse_unknown_name()
        spec = self.spec()
        if self.token.text in ("|", "+"):
            self.fail(
                self.token,
                "transforms and low-rank branches belong in the recipe, not in the number format",
            )
        if self.token.text:
            self.fail(self.token, f"unexpected '{self.token.text}'")
        return spec

    def refuse_unknown_name(self) -> None:
        """Fail on a text that is one word and no format: it was meant as a preset."""
        word = self.text.strip()
        if re.fullmatch(r"[\w.-]+", word) and _ALIASES.get(word, word) not in GRIDS:
            names = [*PRESETS, *GRIDS]
            self.fail(_Token(word, self.token.start), f"unknown format or preset '{word}'", names)

    def spec(self) -> Spec:
        start = self.token
        grid = self.name("number format", list(GRIDS))
        rounding = self.name("rounding", list(ROUNDINGS)) if self.take("@") else "rne"
        factors: list[Factor] = []
        starts = [start]
        if self.token.text == "|":
            self.advance()
            factors, starts = self.factors(starts)
        problem = _problem(grid, factors)
        if problem is not None:
            self.fail(starts[problem[0] + 1], problem[1])
        return Spec(grid, tuple(factors), rounding)

    def factors(self, starts: list[_Token]) -> tuple[list[Factor], list[_Token]]:
        factors = []
        while True:
            starts.append(self.token)
            factors.append(self.factor())
            if not self.take("*"):
                break
        return [_with_default_rule(f, i + 1 < len(factors)) for i, f in enumerate(factors)], starts

    def factor(self) -> Factor:
        if self.take("("):
            return self.nested()
        grid = self.name("scale format", list(GRIDS))
        limit = self.limit() if self.take("[") else None
        rule = ""
        if self.take("."):
            pow2 = GRIDS[grid].kind == "pow2"
            rule = self.name("scale rule", list(SCALE_RULES) if pow2 else ["rne"])
        partition, power = self.partition()
        return Factor(grid, partition, rule, power, limit)

    def nested(self) -> Factor:
        inner = self.spec()
        offset = None
        if self.take(","):
            self.name("option", ["offset"])
            self.need("=", "'='")
            offset = self.name("offset", ["mean"])
        self.need(")", "')'")
        partition, power = self.partition()
        return Factor(inner.grid_name, partition, "rne", power, None, inner, offset)

    def limit(self) -> tuple[int, int]:
        start = self.token
        low = self.number("a whole number", whole=True)
        self.need("..", "'..'")
        high = self.number("a whole number", whole=True)
        self.need("]", "']'")
        if low > high:
            self.fail(start, f"{low:g} is above {high:g}")
        return int(low), int(high)

    def number(self, what: str, whole: bool = False) -> float:
        token = self.advance()
        if not re.fullmatch(r"\d+" if whole else r"\d+(\.\d+)?", token.text):
            self.fail(token, f"expected {what}")
        return float(token.text)

    def partition(self) -> tuple[Partition, float]:
        self.need("/", "'/' and a partition, such as '/g64'")
        token = self.advance()
        partition = Partition.parse(_ALIASES.get(token.text, token.text))
        if partition is None:
            self.fail(token, f"unknown partition '{token.text}'", PARTITION_EXAMPLES)
        power = self.power() if self.take("^") else 1.0
        return partition, power

    def power(self) -> float:
        token = self.token
        power = self.number("a power such as 0.15")
        if not 0.0 < power <= 1.0:
            self.fail(token, "a power lies above 0 and at most 1")
        return power


def _with_default_rule(factor: Factor, has_coarser: bool) -> Factor:
    """Fill in the rule left unsaid: the one that never clips on power-of-two grids, else rne."""
    rule = factor.rule
    if not rule:
        rule = "rne"
        if factor.grid.kind == "pow2":
            rule = "floor" if has_coarser else "ceil"
    return Factor(
        factor.grid_name,
        factor.partition,
        rule,
        factor.power,
        factor.limit,
        factor.nested,
        factor.offset,
    )

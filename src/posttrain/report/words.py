"""Numbers and verdicts as a person would write them, with their units."""

import math

MINUS, MISSING = "\N{MINUS SIGN}", "\N{EN DASH}"
CONFIDENCE = "95%"  # of every interval that `compare` computes


def number(value: float | None, decimals: int = 2, signed: bool = False) -> str:
    """`value` with fixed decimals, thousands separated by thin spaces, a real minus sign.

    >>> number(-1234.5, 1), number(0.25, 2, signed=True), number(None)
    ('−1\\u2009234.5', '+0.25', '–')
    """
    if value is None:
        return MISSING
    if not math.isfinite(value):
        return (
            "not a number" if math.isnan(value) else ("\u221e" if value > 0 else MINUS + "\u221e")
        )
    text = f"{value:{'+' if signed else ''},.{decimals}f}"
    if float(text.replace(",", "")) == 0:
        text = text.lstrip("+-")
    return text.replace("-", MINUS).replace(",", "\u2009")


def decimals_for(step: float, least: int = 0, most: int = 6) -> int:
    """How many decimals show a difference of `step` with two digits."""
    if not (math.isfinite(step) and step > 0):
        return least
    return min(most, max(least, 1 - math.floor(math.log10(step))))


def delta(value: float, low: float, high: float) -> tuple[str, str, str]:
    """A difference and its interval, all with the decimals that the interval's width supports."""
    places = decimals_for((high - low) / 2, least=3)
    shown = [number(v, places, signed=True) for v in (value, low, high)]
    return shown[0], shown[1], shown[2]


def loss(value: float | None) -> str:
    """Nats: four decimals, more where that would leave fewer than two digits.

    >>> loss(2.91274), loss(0.00091), loss(0.0)
    ('2.9127', '0.00091', '0')
    """
    if not value:
        return number(value, 0)
    return number(value, decimals_for(abs(value), least=4, most=9))


def bits(value: float | None) -> str:
    """Bits per weight: two decimals, none when whole.

    >>> bits(32.0), bits(6.25), bits(6.2749)
    ('32', '6.25', '6.27')
    """
    if value is None or not math.isfinite(value):
        return number(value)
    return f"{value:.2f}".removesuffix(".00")


def size(count: float | None) -> str:
    """A number of bytes in decimal units, three digits.

    >>> size(537_000_000), size(999), size(1.5e9)
    ('537 MB', '999 B', '1.50 GB')
    """
    if count is None or not math.isfinite(count):
        return MISSING
    units = ["B", "kB", "MB", "GB", "TB"]
    power = 0
    while count >= 999.5 and power < len(units) - 1:
        count, power = count / 1000, power + 1
    places = 0 if power == 0 or count >= 99.95 else 1 if count >= 9.995 else 2
    return f"{count:.{places}f} {units[power]}"


def percent(share: float | None, decimals: int = 1, signed: bool = False) -> str:
    """A share of one as a percentage."""
    return MISSING if share is None else number(100 * share, decimals, signed) + "%"


def seconds(value: float | None) -> str:
    """A duration: 8.3 s, 2 min 5 s, 1 h 4 min."""
    if value is None or not math.isfinite(value):
        return MISSING
    if value < 60:
        return f"{value:.1f} s"
    minutes, rest = divmod(round(value), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def join(parts: list[str]) -> str:
    """'a', 'a and b', 'a, b and c'."""
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"

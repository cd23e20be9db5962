"""Numbers as people read them. Inside, everything is SI base units: bytes, seconds, per second."""

from __future__ import annotations

from math import floor, isfinite, log10

_LARGE = ("", "k", "M", "G", "T", "P", "E")
_SMALL = ((1.0, "s"), (1e-3, "ms"), (1e-6, "us"), (1e-9, "ns"))


def _scaled(value: float, suffixes: tuple[str, ...]) -> tuple[float, str]:
    """The value with the SI prefix that leaves three digits before the point."""
    size = abs(value)
    if size < 1:
        return value, suffixes[0]
    step = min(floor(log10(size)) // 3, len(suffixes) - 1)
    if step + 1 < len(suffixes) and float(f"{size / 1000**step:.3g}") >= 1000:
        step += 1  # 999.9 kB is 1 MB once it is rounded
    return value / 1000**step, suffixes[step]


def _digits(value: float) -> str:
    """Three significant digits without an exponent; whole numbers stay whole."""
    if value == int(value) and abs(value) < 1000:
        return str(int(value))
    if abs(value) >= 100:
        return f"{value:.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def format_bytes(num_bytes: float) -> str:
    """Bytes in decimal units: 80_000_000_000 is '80 GB'.

    >>> format_bytes(31_500_000)
    '31.5 MB'
    """
    if not isfinite(num_bytes):
        return str(num_bytes)
    value, prefix = _scaled(num_bytes, _LARGE)
    return f"{_digits(value)} {prefix}B"


def format_count(count: float) -> str:
    """A count with an SI prefix and no unit: 8_030_261_248 is '8.03G'."""
    if not isfinite(count):
        return str(count)
    value, prefix = _scaled(count, _LARGE)
    return f"{_digits(value)}{prefix}"


def format_rate(per_second: float, unit: str = "B") -> str:
    """A rate: format_rate(450e9) is '450 GB/s', format_rate(989e12, 'FLOP') is '989 TFLOP/s'."""
    if not isfinite(per_second):
        return f"{per_second} {unit}/s"
    value, prefix = _scaled(per_second, _LARGE)
    return f"{_digits(value)} {prefix}{unit}/s"


def format_seconds(seconds: float) -> str:
    """A duration: '12.3 ms', '4.2 s', '3 min 20 s', '2 h 5 min', '3 d 4 h'."""
    if not isfinite(seconds):
        return str(seconds)
    if seconds < 0:
        return f"-{format_seconds(-seconds)}"
    if seconds >= 99.95:
        whole = round(seconds)
        for size, name, smaller, small_name in (
            (86400, "d", 3600, "h"),
            (3600, "h", 60, "min"),
            (60, "min", 1, "s"),
        ):
            if whole >= size:
                rest = whole % size // smaller
                return f"{whole // size} {name}" + (f" {rest} {small_name}" if rest else "")
    for size, unit in _SMALL:
        if seconds >= size:
            return f"{_digits(seconds / size)} {unit}"
    return "0 s" if seconds == 0 else f"{seconds / 1e-9:.3g} ns"


def seconds_apart(one: float, other: float) -> tuple[str, str]:
    """Two durations; where three digits show them alike, with one or two more.

    >>> seconds_apart(5.1041, 5.0996)
    ('5.104 s', '5.100 s')
    """
    found = format_seconds(one), format_seconds(other)
    least = min(one, other)
    if found[0] != found[1] or not 1e-9 <= least < 99.95:
        return found
    size, unit = next((size, unit) for size, unit in _SMALL if least >= size)
    for digits in (4, 5):
        told = [f"{x / size:#.{digits}g}".rstrip(".") + f" {unit}" for x in (one, other)]
        if told[0] != told[1]:
            return told[0], told[1]
    return found


def sign_of(seconds: float) -> str:
    """A difference: +3 ms, -2 s."""
    return ("+" if seconds >= 0 else "-") + format_seconds(abs(seconds))


def times(value: float, limit: float) -> str:
    """How many times the limit a value above it is, with the digits that show that it is above.

    >>> times(3.0, 2.0), times(22.603e9, 22.6e9)
    ('1.50 times', '1.0001 times')
    """
    ratio = value / limit
    shown = (f"{ratio:.{digits}f}" for digits in range(2, 10))
    return next((text for text in shown if float(text) != 1), f"{ratio:.2f}") + " times"


def bytes_apart(one: float, other: float) -> tuple[str, str]:
    """Two sizes; where three digits show them alike, with as many as tell them apart.

    >>> bytes_apart(22.603e9, 22.6e9)
    ('22.603 GB', '22.600 GB')
    """
    found = format_bytes(one), format_bytes(other)
    if one == other or found[0] != found[1]:
        return found
    value, prefix = _scaled(one, _LARGE)
    size = one / value
    for digits in range(2, 10):
        told = f"{value:.{digits}f} {prefix}B", f"{other / size:.{digits}f} {prefix}B"
        if told[0] != told[1]:
            return told
    return found

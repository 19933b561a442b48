"""Names and numbers as people read them; names come from files and are not trusted."""

from __future__ import annotations

import html
import math
import re

MISSING = "-"
_HARMLESS = re.compile(r"[A-Za-z0-9 .,:%+/-]*")


def clean(text: str) -> str:
    """Return `text` on one line and without characters that cannot be printed."""
    spaced = " ".join(text.split())
    if spaced.isprintable():
        return spaced
    return "".join(
        letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in spaced
    )


def cut(text: str, length: int) -> str:
    """Return `text`, cleaned, of at most `length` letters; what is cut off becomes an ellipsis."""
    text = clean(text)
    return text if len(text) <= length else text[: length - 1] + "…"


def escape(text: str) -> str:
    r"""Return `text` so that markdown shows it as it is, in a table's cell too.

    >>> escape("a|b <script> *x* sdpa_contiguous _y_")
    'a\\|b &lt;script&gt; \\*x\\* sdpa_contiguous \\_y\\_'
    """
    text = clean(text)
    if _HARMLESS.fullmatch(text):
        return text
    text = html.escape(text, quote=False)
    text = re.sub(r"([\\`*\[\]|~$])", r"\\\1", text)
    return re.sub(r"(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])", r"\\_", text)


def number(value: float | None) -> str:
    """Return `value` with four significant digits, or a dash for None.

    >>> number(9.5), number(361.84), number(1413.6), number(18400.0)
    ('9.500', '361.8', '1,414', '18,400')
    """
    if value is None:
        return MISSING
    if value == 0:
        return "0"
    if not 1e-3 <= abs(value) < 1e9:
        return f"{value:.3g}"
    decimals = max(0, 3 - math.floor(math.log10(abs(value))))
    return f"{value:,.{decimals}f}"


def percent(share: float | None) -> str:
    """Return a fraction as a percentage, or a dash for None."""
    return MISSING if share is None else f"{100 * share:.0f} %"


def times(ratio: float | None) -> str:
    """Return a speedup, with two decimals or two significant digits, or a dash for None.

    >>> times(1.113), times(0.1), times(0.0994), times(0.0043), times(1234.5)
    ('1.11x', '0.10x', '0.099x', '0.0043x', '1,234x')
    """
    if ratio is None:
        return MISSING
    if 0 < ratio < 0.0995:
        return f"{ratio:#.2g}x"
    return f"{ratio:.2f}x" if ratio < 100 else f"{number(ratio)}x"


def duration(microseconds: float) -> str:
    """Return a time in the unit that suits it.

    >>> duration(0.5), duration(361.84), duration(1200), duration(2.5e6)
    ('500 ns', '362 µs', '1.2 ms', '2.5 s')
    """
    for unit, size in (("s", 1e6), ("ms", 1e3), ("µs", 1.0)):
        if microseconds >= 0.9995 * size:
            return f"{float(f'{microseconds / size:.3g}'):g} {unit}"
    return f"{float(f'{microseconds * 1e3:.3g}'):g} ns"


def flops_rate(tflop_per_s: float) -> str:
    """Return a rate in the unit that suits it, ``613.6 TFLOP/s`` or ``71.06 GFLOP/s``."""
    if tflop_per_s >= 1:
        return f"{number(tflop_per_s)} TFLOP/s"
    return f"{number(1e3 * tflop_per_s)} GFLOP/s"


def tokens(count: float) -> str:
    """Return a number of tokens, whole multiples of 1024 as ``4k``."""
    return f"{count / 1024:g}k" if count >= 1024 and count % 1024 == 0 else f"{count:g}"


def plural(count: int, noun: str) -> str:
    """Return ``1 row``, ``2 rows``."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"

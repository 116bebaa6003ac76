"""Figures and names as pages and tables show them."""

DASH, MINUS = "\N{EN DASH}", "\N{MINUS SIGN}"


def number(value: float | None, digits: int = 4) -> str:
    """A measured number with its digits, a dash where there is none."""
    if value is None:
        return DASH
    return f"{value:.3g}" if value and abs(value) < 10**-digits else f"{value:,.{digits}f}"


def with_error(value: float | None, error: float | None, digits: int = 4) -> str:
    """A value and its standard error."""
    text = number(value, digits)
    return text if value is None or error is None else f"{text} ± {number(error, digits)}"


def signed(value: float | None, digits: int = 4) -> str:
    """A difference with its sign; a true minus sign."""
    if value is None:
        return DASH
    # Adding zero takes the sign off a zero.
    return f"{round(value, digits) + 0.0:+,.{digits}f}".replace("-", MINUS)


def words(name: str) -> str:
    """A name of the files as a person writes it."""
    return name.replace("_", " ")


def short(tokens: int) -> str:
    """A number of tokens in three digits, k and M being powers of two: "348k"."""
    for unit, size in (("M", 2**20), ("k", 2**10)):
        if tokens >= size:
            long = tokens >= 1000 * size
            return f"{tokens // size:,}{unit}" if long else f"{tokens / size:,.3g}{unit}"
    return str(tokens)


def plus_minus(
    value: float | None, error: float | None = None, digits: int = 4, sign: str = ""
) -> str:
    """A figure and its standard error with fixed digits; empty where there is none."""
    if value is None:
        return ""
    shown = f"{value:{sign}.{digits}f}"
    return shown if error is None else f"{shown} ± {error:.{digits}f}"

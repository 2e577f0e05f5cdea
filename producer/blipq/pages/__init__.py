"""HTML: one way to make pages, for the reports that are files and for the console.

What pages show came from strangers, so every text is escaped. ``shared/`` holds what all pages have
in common: the colours of both schemes, and the mark.
"""

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined


def environment(package: str, folder: str = "page") -> Environment:
    """The templates in a package's folder, beside the shared ones. A missing name is an error."""
    return Environment(
        loader=ChoiceLoader([PackageLoader(package, folder), PackageLoader(__name__, "shared")]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )

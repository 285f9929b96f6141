"""Configure the documentation site: `make docs` writes build/docs/index.html. Building and reading need no network."""

import sys
from pathlib import Path

DOCS = Path(__file__).resolve().parent
sys.path[:0] = [str(DOCS.parent), str(DOCS)]  # normkern; sphinx_parts

import normkern  # noqa: E402

project = "normkern"
release = version = normkern.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.mathjax",
    "sphinx-mathjax-offline",  # MathJax itself, copied into the site
    "sphinx_copybutton",
    "sphinx_parts.docstrings",
    "sphinx_parts.links",
    "sphinx_parts.tables",
]
exclude_patterns = ["figures", "sphinx_parts"]
highlight_language = "none"
default_role = "py:obj"  # `SGD` in a docstring: a link where there is one to make, else code

nitpicky = True
nitpick_ignore_regex = [
    ("py:obj", ".*"),  # see default_role
    ("py:class", r"(torch|collections|contextlib|typing|fractions|ops|nn)\b.*"),  # no network to look them up
    ("py:class", r"Axes|normkern\.(monitors\.report\.Entry|_C\.GaugeStep)"),
    ("py:class", r"normkern\.optim\.(halves\.Batch|fused\.FusedOptimizer|pair_steps\.PairSteps)"),
    ("py:class", r"normkern\.noise\.per_sample\.(tensor_state\.TensorState|operation\.Operation)"),
]

myst_enable_extensions = ["dollarmath", "colon_fence", "deflist", "attrs_inline"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
autodoc_mock_imports = ["lightning", "timm", "transformers"]
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 100
napoleon_numpy_docstring = False
napoleon_use_param = False  # "lr, momentum: finite" is one entry of several names
napoleon_use_rtype = False
napoleon_custom_sections = [("Fields", "params_style")]

html_theme = "furo"
html_title = f"normkern {version}"
html_static_path = ["sphinx_parts/static"]
html_css_files = ["site.css"]
html_show_sphinx = False
html_show_copyright = False
html_copy_source = False
pygments_style = "friendly"
pygments_dark_style = "monokai"
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

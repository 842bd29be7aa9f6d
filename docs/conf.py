"""Settings of Sphinx: `make docs` builds these pages into build/docs, with warnings as errors."""

import sys
from pathlib import Path

from sphinx.ext.autodoc.mock import mock

sys.path.insert(0, str(Path(__file__).parents[1]))

import paa_gpu

# The integration asks mmdetection for its version. Whoever builds the pages need not have it.
with mock(["mmdet"]):
    import mmdet

    mmdet.__version__ = "3.3.0"
    import paa_gpu.integrations.mmdet

project = "paa_gpu"
version = release = paa_gpu.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme = "furo"
html_title = f"paa_gpu {version}"
html_copy_source = False

default_role = "py:obj"  # `paa_reassign` in a docstring becomes a link
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # docstrings say shapes and dtypes, which types cannot
napoleon_numpy_docstring = False
napoleon_use_param = False  # so that arguments that share an entry stay together
napoleon_use_rtype = False
autodoc_preserve_defaults = True
myst_heading_anchors = 3

"""Names of kernels, the same whoever compiled them."""

import re
import subprocess


def readable(mangled) -> list[str]:
    """Without namespaces and parameters: nk::cuda::update<nk::Sgd, (nk::Measure)1, float>(...) is update<Sgd, 1, float>."""
    text = "\n".join(mangled)
    names = subprocess.run(["c++filt"], input=text, check=True, capture_output=True, text=True).stdout
    return [_short(name) for name in names.splitlines()]


def _short(name: str) -> str:
    name = re.sub(r"^void |\(anonymous namespace\)::", "", name)
    depth = 0
    for k, c in enumerate(name):  # up to the parameters
        depth += (c == "<") - (c == ">")
        if c == "(" and not depth:
            name = name[:k]
            break
    return re.sub(r"\((?:\w+::)*\w+\)|(?:\w+::)+", "", name)

"""Products on tensor cores, in PTX, that can be reached from the wait for a copy without a proxy fence in between.

wgmma and tcgen05.mma read shared memory past the path that cp.async writes it by. Every way through the code
counts, also where a product reads another tile than the one waited for: a kernel may be found at fault that is not.
"""

from __future__ import annotations

import re

PRODUCT = re.compile(r"wgmma\.mma_async|tcgen05\.mma")
LABEL = re.compile(r"(\$\w+):")
BRANCH = re.compile(r"(@!?%\w+\s+)?bra(?:\.uni)?\s+(\$\w+)")


def unfenced_products(ptx: str) -> set[int]:
    """The lines of such products."""
    lines = [line.strip() for line in ptx.splitlines()]
    labels = {found[1]: number for number, line in enumerate(lines) if (found := LABEL.match(line))}
    found, seen, ahead = set(), set(), [(0, False)]
    while ahead:
        number, arrived = ahead.pop()  # arrived: a copy has, and no fence has followed
        while number < len(lines) and (number, arrived) not in seen:
            seen.add((number, arrived))
            line = lines[number]
            if "cp.async.wait" in line:
                arrived = True
            elif "fence.proxy.async" in line:
                arrived = False
            elif arrived and PRODUCT.search(line):
                found.add(number)
            if branch := BRANCH.match(line):
                ahead.append((labels[branch[2]], arrived))
            if line.startswith("ret") or (branch and not branch[1]):
                break
            number += 1
    return found

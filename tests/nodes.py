"""Two Ray nodes of one CPU each on this machine, for tests: prints the address, kills the second on a line `kill`.

python tests/nodes.py
"""

from __future__ import annotations

import sys

from ray.cluster_utils import Cluster


def main() -> None:
    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "object_store_memory": 200_000_000})
    second = nodes.add_node(num_cpus=1, object_store_memory=200_000_000)
    print(nodes.address, flush=True)
    for line in sys.stdin:
        if line.strip() == "kill":
            nodes.remove_node(second, allow_graceful=False)
            print("killed", flush=True)
    nodes.shutdown()


if __name__ == "__main__":
    main()

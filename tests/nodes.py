"""Two Ray nodes of one CPU each on this machine, for tests: prints the address; on a line `kill` the node that joined
first is killed, on a line `add` another one joins.

python tests/nodes.py
"""

from __future__ import annotations

import sys

from ray.cluster_utils import Cluster


def main() -> None:
    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "object_store_memory": 200_000_000})
    joined = [nodes.add_node(num_cpus=1, object_store_memory=200_000_000)]
    print(nodes.address, flush=True)
    for line in sys.stdin:
        if line.strip() == "kill":
            nodes.remove_node(joined.pop(0), allow_graceful=False)
            print("killed", flush=True)
        elif line.strip() == "add":
            joined.append(nodes.add_node(num_cpus=1, object_store_memory=200_000_000))
            print("added", flush=True)
    nodes.shutdown()


if __name__ == "__main__":
    main()

"""Draining a node in Ray: nothing new is put there, and its death, when it comes, is known for a preemption.

Ray does this for its own autoscaler and ``ray drain-node``, by an interface that it does not promise to keep:
where it is not as we know it, nothing is drained, which costs a slower and unlabelled death and no more. What
runs on the node runs on, also past the deadline, which Ray only tells to those who ask. It cannot be undone:
a node that lives on keeps the actors it has and gets no new ones.
"""

import logging
import time

import ray

RPC_S = 5.0

logger = logging.getLogger(__name__)


def drain(node_id: str, why: str, left_s: float | None = None) -> bool:
    """Ask Ray to drain a node of the connected cluster; False, and a word in the log, if it did not.

    Args:
        node_id: Ray's own, in hex.
        left_s: Seconds until the node is expected to be gone, if that is known.
    """
    try:
        from ray.core.generated.autoscaler_pb2 import DrainNodeReason

        until_ms = 0 if left_s is None else int((time.time() + max(left_s, 0.0)) * 1000)
        reason = DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
        client = ray._private.worker.global_worker.gcs_client
        accepted, refusal = client.drain_node(node_id, reason, why, until_ms, timeout=RPC_S)
    except (
        Exception
    ) as error:  # whatever a private interface may do in another version: draining is a courtesy
        logger.warning("node %s is not drained in Ray: %s: %s", node_id[:8], type(error).__name__, error)
        return False
    if not accepted:
        logger.warning("node %s is not drained in Ray: %s", node_id[:8], refusal)
    return bool(accepted)


def draining() -> frozenset[str]:
    """The ids of the nodes that are being drained, by whomever; none if Ray cannot say."""
    try:
        return frozenset(ray._private.state.state.get_draining_nodes())
    except Exception:
        return frozenset()

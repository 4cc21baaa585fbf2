"""Whether an attempt that has not said its last word is lost with its slot, and through what. Pure.

Only a death report or long silence ends an attempt here. A node that was announced to be gone by now, and
says nothing, is believed sooner.
"""

from storage.records import EndReason

from .cluster import Health, Slot

OVERDUE_SILENCE_S = 10.0
"""The silence that is enough once the time of a notice is over."""


def loss(
    slot: Slot, silent_s: float, limit_s: float, *, drained: bool = False
) -> tuple[EndReason, str] | None:
    """Return why the attempt on a slot is over, and in words; None: it may be training.

    Args:
        silent_s: How long neither the slot nor the attempt's log has shown life.
        limit_s: The longest silence of a slot that may still live.
        drained: An operator has taken the node out of use.
    """
    notice = slot.notice if slot.ending else None
    if slot.health is Health.GONE:
        if slot.out_of_memory and not slot.node_lost:
            return EndReason.OOM_HOST, f"{slot.node} ran out of memory, and Ray ended the agent for that"
        if notice and notice.soon:
            return EndReason.SPOT_NOTICE, str(notice)
        if drained and slot.node_lost:
            return EndReason.DRAINED, f"{slot.node} is drained, and gone"
        stays = notice is not None and notice.withdrawn and not slot.node_lost  # though Ray believes it goes
        if slot.preempted and not stays:
            return EndReason.SPOT_NOTICE, "spot notice from Ray"
        if slot.node_lost:
            return EndReason.NODE_LOST, f"{slot.node} was lost without notice"
        return EndReason.AGENT_LOST, f"the agent on {slot.node} died"
    if slot.health is Health.UNKNOWN:
        if notice and notice.overdue and silent_s > min(OVERDUE_SILENCE_S, limit_s):
            return EndReason.SPOT_NOTICE, str(notice)
        if silent_s > limit_s:
            return EndReason.NODE_UNREACHABLE, f"{slot.node} did not answer for {slot.silent_s:.0f} s"
    return None

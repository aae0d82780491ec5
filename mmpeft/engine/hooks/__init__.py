"""Hooks, entered through ``default_hooks`` or ``custom_hooks``."""
from .calibrate_hook import CalibrateHook
from .peft_checkpoint_hook import PEFTCheckpointHook
from .peft_report_hook import PEFTReportHook
from .rank_budget_hook import RankBudgetHook
from .subnet_hook import SubnetHook

__all__ = [
    'CalibrateHook', 'PEFTCheckpointHook', 'PEFTReportHook', 'RankBudgetHook',
    'SubnetHook'
]

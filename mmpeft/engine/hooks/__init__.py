"""Hooks, entered through ``default_hooks`` or ``custom_hooks``."""
from .peft_report_hook import PEFTReportHook
from .rank_budget_hook import RankBudgetHook

__all__ = ['PEFTReportHook', 'RankBudgetHook']

"""Hooks, entered through ``default_hooks``."""
from .peft_report_hook import PEFTReportHook

__all__ = ['PEFTReportHook']

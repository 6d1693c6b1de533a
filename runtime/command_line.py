"""How `--help` reads: every option with its default, where it has one that says something."""

import argparse


class HelpWithDefaults(argparse.ArgumentDefaultsHelpFormatter):
    """Leaves out the defaults that a reader can do nothing with: none, an empty text, a switch that is off."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default in (None, "", False):
            return action.help
        return super()._get_help_string(action)

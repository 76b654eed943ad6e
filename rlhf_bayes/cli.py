"""The old place of [`rlhf_bayes.commands.flags`], kept so that scripts that import from here go on working."""

from rlhf_bayes.commands.flags import *  # noqa: F403
from rlhf_bayes.commands.flags import __all__ as __all__

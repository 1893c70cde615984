"""The verbs of ``dnpo``, without the modules that do their work."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Verb:
    """A command.

    Attributes:
        purpose: what it does, in a line.
        module: the module with its function ``main(arguments)``.
        before: arguments that are put before the user's.
    """

    purpose: str
    module: str
    before: tuple[str, ...] = ()


VERBS = {
    "train": Verb("one run: dnpo train method=spin seed=1", "dnpo.commands.train"),
    "sweep": Verb("many runs: dnpo sweep main, dnpo sweep npo.alpha=0.01,0.1", "dnpo.commands.sweep"),
    "methods": Verb("the methods and their sources; dnpo methods osp explains one", "dnpo.commands.methods"),
    "evaluate": Verb("measure one model, or two against each other", "dnpo.commands.evaluate"),
    "leaderboard": Verb("measure a model on public benchmarks", "dnpo.commands.leaderboard"),
    "judge agreement": Verb("compare a judge with people", "dnpo.commands.agreement"),
    "judge fit": Verb("fit a reward model to preferences", "dnpo.commands.reward", ("fit",)),
    "judge ledger": Verb("questions to judges, and what they cost", "dnpo.commands.ledger"),
    "report": Verb("one HTML page on a run or a sweep", "dnpo.commands.report"),
    "browse": Verb("a page to look at samples and pairs of runs", "dnpo.commands.browse"),
    "figures": Verb("figures and tables of the papers, from tracked runs", "analysis.command"),
    "claims": Verb("the claims of the papers: which of them hold here", "analysis.claims"),
    "claims plan": Verb("how many seeds and prompts the claims need", "analysis.claims_plan"),
    "chat": Verb("talk to a policy of a run, or to two side by side", "dnpo.commands.chat"),
    "sample": Verb("responses of a policy to prompts of your own, as JSON lines", "dnpo.commands.sample"),
    "export": Verb("write a policy of a run as a folder that needs nothing else", "dnpo.commands.export"),
    "store": Verb("list, verify, remove or publish finished stages", "dnpo.commands.store"),
    "completion": Verb("completion of verbs and settings in bash, zsh or fish", "dnpo.commands.completion"),
    "doctor": Verb("what is installed, which device there is, what is missing", "dnpo.commands.doctor"),
}

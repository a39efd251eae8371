"""Commands around a trained model that training does not need; `formtune` lists them if this package is installed."""

from formtune.configuration.yaml_file import config_paths

COMMANDS = {  # module and description
    "try": ("try_run", "Type a prompt; see the answers of the base and of the tuned model."),
    "synthesize": ("synthesize", "Ask a teacher model to answer prompts; keep the answers with a valid format."),
    "preflight": ("preflight", "Check before training whether the result can be merged, quantized and served."),
    "promote": ("promote", "Deploy a run under a name such as production, if it is not worse on the test rows."),
    "rollback": ("promote", "Return a deployment to its previous version."),
    "deployments": ("promote", "List deployments and their history."),
    "serve": ("serve", "Serve a run or a deployment on this machine, or print the vLLM command."),
    "check-endpoint": ("check_endpoint", "Send the test rows to a server; check its answers and speed."),
}


def task_file(args: list[str]) -> str:
    """The last YAML that a command line names, to print in the next command."""
    return (config_paths(args) or ["TASK.yaml"])[-1]

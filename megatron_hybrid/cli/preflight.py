"""Check the nodes of a run before it starts: `megatron-hybrid launch preflight CONFIG.yaml [section.key=value ...]`.

Start it as `megatron-hybrid pretrain`: by `megatron-hybrid launch`, torchrun, mpirun or srun. Training runs the same checks before its
first step.
Exit codes: 0 ready; 75 stopped by a signal; 78 not ready, or a wrong command line or configuration.
"""

from megatron_hybrid.launch import stop_signals


def main() -> int:
    """Run the command and return the exit status."""
    stop_signals.watch()  # before the imports that take time
    from megatron_hybrid.base.errors import no_traceback
    from megatron_hybrid.config.command_line import RunCommandLine
    from megatron_hybrid.config.load import load_run
    from megatron_hybrid.convert.architecture import architecture_of
    from megatron_hybrid.launch.environment import Launch

    arguments = RunCommandLine(__doc__).parse()
    with no_traceback():
        launch = Launch.from_environment().export()
        config = load_run(arguments.config, arguments.overrides, architecture_of)
        from megatron_hybrid.train.start_checks import preflight_alone  # torch only once the config is right

        preflight_alone(config, launch)
    return 0

from megatron_hybrid.distributed.quiet import silence_known_warnings

silence_known_warnings()

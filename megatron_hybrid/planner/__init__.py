"""Which parallel degrees to train with: memory and time of every legal layout, predicted. No torch: it answers on a laptop.

plan            a model and its batch under one layout
parameters      a rank's weights, gradients and optimizer state, exact to the byte
activations     what each kind of layer keeps for its backward pass: the table to edit when a layer changes
memory          the two together, by part:  `expected(config, world_size).line()` is what the trainer prints
hardware        a GPU and its network, as measured (gpus/*.yaml), and calibration laid over it
network         collectives by size and placement
timing          a step's time by part;  schedule: the pipeline, event by event
search          every layout, ranked, or rejected with the reason
report, emit, measured, plot, command     what tools/tune_parallelism.py does with it
"""

"""What there is to run on: GPU descriptions, and detection of this machine's devices and memory.

``profiles`` reads the bundled GPU descriptions; ``nvml`` alone talks to NVML; ``host`` reads RAM and control groups;
``detect`` puts them together; ``backends`` says which optional kernels are usable.
"""

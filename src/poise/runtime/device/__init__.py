"""The fast loop on the device: Triton kernels, one launch each, no word to the host.

What is proven of them: docs/device.md.

==========  ===========================================================================
``flow``    the exact flow of tokens from full devices to others (used by the next two)
``split``   a step's counts over given holders
``fill``    replicas for step slots from predicted work
``rows``    one source's tokens to its nearest holders
``decide``  whether the static placement is better left alone
==========  ===========================================================================
"""

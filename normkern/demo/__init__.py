"""The demo: a small batch-normalised ResNet on handwritten digits, and what normkern's optimizers measure as it trains.

A convolution that is followed by BatchNorm computes the same function whatever the length of its weights, so only their
direction learns. Weight decay sets how far that direction turns in a step: the length settles where decay and updates
balance, and the angle between the weights before and after a step then depends on the learning rate, the weight decay
and the momentum only. The demo prints and draws that angle beside its prediction.

`normkern.SVAG` takes l times as many steps of 1/l the size, from two batches each. An epoch of its run covers the same
training time as an epoch of the others: l times the steps, 2l times the passes over the data. SVAG also measures the
gradient noise.

With ``--optimizer adamw`` `normkern.AdamW` trains. Its learning rate and weight decay are chosen so that the predicted
angle is the same.

With ``--noise-every 10`` the demo measures, at every tenth batch, the noise of the gradients of its samples. The run
stays the same to the bit.

With ``--decay exponential`` an exponentially growing learning rate replaces the weight decay, and the run is the same.
"""

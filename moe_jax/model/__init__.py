"""The transformer's math, written as for one device.

A token's way: embed -> (norm -> attention -> norm -> router -> dispatch -> experts -> combine) x layers ->
norm -> logits. Where a deployment spreads a step over devices it hands in its own piece through
:class:`moe_jax.model.block.Seams`; nothing in this package knows of it.

Shape letters, used as suffixes of array names all over the project (``x_BLD``). A letter names the logical
dim; inside a deployment the array may hold only a part of it.

=====  ==========================================================
B      sequences (batch)
L      positions of a sequence
S      positions a KV cache can hold
T      tokens, B and L flattened
D      d_model, the residual stream
V      vocabulary
H      query heads
G      key/value heads
A      width of one head
E      experts
F      hidden width of an expert
K      experts chosen for one token (top-k)
N      layers
R      rows: a token's copies sent to an expert (T x K in all)
X      blocks of rows, each block for one expert
M      microbatches
=====  ==========================================================
"""

"""The models, in one flat folder of plain torch: each travels to the Hub with what it needs.

Shapes are written in one alphabet:

    B batch              W tokens in a window        H heads
    T tokens in a call   U summary tokens            K channels per head
    V vocabulary         S short-term memory tokens  D channels
                         M slots of a longer memory

Read in this order: `position`, `attention`, `windows` (how a call falls into windows), `ragged`
(rows that stand at different places), `decoder` (the skeleton that all share), `modeling_melodi`,
`sliding_window` (the layer of the Transformer-XL, which others build on),
`modeling_transformer_xl`, `modeling_block_recurrent`, `compression` and
`modeling_compressive_transformer`, `legs` and `modeling_elastic_memory`, `retrieval`, `past` and
`modeling_memorizing_transformer` (a memory of tokens as they were), then `cache` (the memory during
generation), `adapters` (models inside PEFT and other wrappers), `side_by_side` and `wavefront`
(windows of several layers read at once), `costs` (what it all costs) and `meliad` (parity with the
released code).
"""

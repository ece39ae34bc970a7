"""The models, in one flat folder of plain torch: each travels to the Hub with what it needs.

Shapes are written in one alphabet:

    B batch              W tokens in a window        H heads
    R rows of a step     U summary tokens            K channels per head
    T tokens in a call   S short-term memory tokens  D channels
    V vocabulary         M slots of a longer memory

Read in this order: `layer` (what an architecture implements, and what all share),
`modeling_melodi`, `modules` (attention, norms), `windows` (which tokens fall into which window),
`decoder` (the model and the language model), `cache`, `generation`, `reading`. CONTRIBUTING has one
page on how they fit together.
"""

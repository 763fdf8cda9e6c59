"""Looking at data: what training will see of a mixture, as one page.

    packs of the plan -> statistics.py -> tables and charts   \
                                                               page.py + page.html.j2 -> HTML
    the batches made of some of them -> packs.py -> pictures   /

Everything comes from the planner, the materializer and the window code that training runs; nothing
here decides what is learned. The folder knows `casa_train.data` and the window code, no model.
"""

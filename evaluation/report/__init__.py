"""What a run showed: ``report.json``, one self-contained page, and the table in the terminal.

``python -m evaluation.report --run runs/<experiment>`` goes through the modules in this order:

* ``collect`` reads what the stages of the experiment left in the folder of the run, file by file through
  ``inputs``;
* ``statistics`` makes means, deviations and paired differences over seeds of it;
* ``tables``, ``figures`` and ``examples`` make the parts of the page: tables, plots, and grids of pictures;
  ``sets``, ``embedding``, ``gain`` and ``sweeps`` each make those of one section or question; ``style`` and
  ``labels`` are how plots look;
* ``page`` fills ``report.html.j2`` with them and writes the report.
"""

"""The HTTP door: jobs, uploads and an operator's views for services in any language, and browsers.

One event loop with one ``AsyncClient``: all who wait share its subscription. What only the
synchronous ledger offers runs on a few threads. ``app`` has the routes, ``gate`` stands before all
of them, ``server`` runs both under uvicorn. Neither client nor worker imports this package: ``cli``
joins the command ``blipq`` through an entry point.
"""

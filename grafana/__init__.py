"""The pages and rules for the gateway's metrics, and what shows them.

    promql.py    queries, made of the catalogue's families        <- a name that is not there does not build
    panels.py    what a panel and a page look like
    pages/       what stands on each page
    build.py     `python -m grafana.build` writes dashboards/*.json

    prometheus/  scrape, recording and alerting rules, their tests
    provisioning/, tracing/, traffic.py  what docker-compose.yml mounts

1. A page is classic JSON (schema v1 of dashboards) that any Grafana imports: nothing in it names a data source, a job
   or a key; all are variables.
2. A counter stands within `rate` or `increase`, over `$__rate_interval` or the page's range.
3. Every panel has a title, a sentence on how to read it, and a unit; every page at most `panels.MOST` of them.
"""

"""The pages of the console, with the right that each needs."""

from starlette.requests import Request
from starlette.responses import Response

from blipq_api.console import bulk, job, lists, pictures, signing, trying
from blipq_api.console.access import Page
from blipq_api.console.pages import file_response
from blipq_api.problems import Problem


async def static(request: Request) -> Response:
    """A file that pages use."""
    found = file_response(request.path_params["name"])
    if found is None:
        raise Problem(404, "not_found", "there is no such file")
    return found


PAGES = (
    Page("GET", "/", signing.home, None),
    Page("GET", "/console", signing.home, None),
    Page("GET", "/console/static/{name}", static, None),
    Page("GET", "/console/login", signing.login, None),
    Page("POST", "/console/login", signing.sign_in, None),
    Page("POST", "/console/logout", signing.sign_out, None),
    Page("GET", "/console/", lists.overview, "read"),
    Page("GET", "/console/jobs", lists.list_jobs, "read"),
    Page("GET", "/console/find", lists.find_job, "read"),
    Page("POST", "/console/select", bulk.select, "read"),
    Page("POST", "/console/bulk", bulk.act, "read"),
    Page("GET", "/console/job", job.job, "read"),
    Page("POST", "/console/job", job.act, "read"),
    Page("GET", "/console/stages", job.stages_of, "read"),
    Page("GET", "/console/picture", pictures.picture, "read"),
    Page("GET", "/console/heat", pictures.heat_map, "read"),
    Page("GET", "/console/try", trying.form, "submit"),
    Page("POST", "/console/try", trying.submit, "submit"),
    Page("GET", "/console/runs", lists.runs, "read"),
    Page("GET", "/console/dead", lists.dead_letters, "read"),
    Page("GET", "/console/webhooks", lists.webhooks, "admin"),
    Page("POST", "/console/webhooks", lists.replay, "admin"),
    Page("GET", "/console/queues", lists.queues, "read"),
    Page("POST", "/console/queues", lists.change_queue, "admin"),
    Page("GET", "/console/log", lists.log, "admin"),
    Page("GET", "/console/workers", lists.workers, "read"),
)

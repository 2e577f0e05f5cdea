"""Prints each trace that is sent to http://127.0.0.1:4318: see docs/tracing.md.

It needs what `blipq[otel]` installs. `python examples/tracing/collector.py [PORT]`
"""

import gzip
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest


class Traces(BaseHTTPRequestHandler):
    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        for process in ExportTraceServiceRequest.FromString(body).resource_spans:
            names = {each.key: each.value.string_value for each in process.resource.attributes}
            for scope in process.scope_spans:
                for span in scope.spans:
                    ms = (span.end_time_unix_nano - span.start_time_unix_nano) / 1e6
                    trace, parent = span.trace_id.hex(), span.parent_span_id.hex() or "-" * 16
                    line = f"{trace} {parent} > {span.span_id.hex()} {ms:8.1f} ms"
                    print(line, names["service.name"], span.name, flush=True)
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *arguments):
        """Only spans are printed."""


if __name__ == "__main__":
    port = int(sys.argv[1]) if len(sys.argv) > 1 else 4318
    server = ThreadingHTTPServer(("127.0.0.1", port), Traces)
    print(f"http://127.0.0.1:{server.server_address[1]}", flush=True)
    server.serve_forever()

"""A request by curl's library through an HTTP/2 proxy, as by `curl --proxy-http2`. Prints one JSON object.

Arguments: the folder with the certificate, the proxy's address, and the URL.
"""

import io
import json
import sys

import pycurl

FOLDER, PROXY, URL = sys.argv[1:]
# pycurl has no name for CURLPROXY_HTTPS2.
HTTPS2 = 3

body = io.BytesIO()
# What curl says about the tunnel, as with `--verbose`.
said = []


def debug(kind, text):
    if kind == pycurl.INFOTYPE_TEXT:
        said.append(text.decode().strip())


curl = pycurl.Curl()
for option, value in {
    pycurl.URL: URL,
    pycurl.TIMEOUT: 120,
    pycurl.WRITEDATA: body,
    pycurl.VERBOSE: 1,
    pycurl.DEBUGFUNCTION: debug,
    pycurl.HTTPPROXYTUNNEL: 1,
    pycurl.PROXY: f"https://{PROXY}",
    pycurl.PROXYTYPE: HTTPS2,
    pycurl.PROXY_CAINFO: f"{FOLDER}/root.pem",
    pycurl.PROXY_SSLCERT: f"{FOLDER}/certificate.pem",
    pycurl.PROXY_SSLKEY: f"{FOLDER}/key.pem",
    # The proxy's name is a SPIFFE ID; its chain is verified.
    pycurl.PROXY_SSL_VERIFYHOST: 0,
    pycurl.PROXY_SSL_VERIFYPEER: 1,
}.items():
    curl.setopt(option, value)
seen = {"version": pycurl.version}
try:
    curl.perform()
except pycurl.error as error:
    seen["error"] = error.args[1]
seen["said"] = said
seen["body"] = body.getvalue().decode()
print(json.dumps(seen))

"""An app that gets its certificate by the SPIFFE Workload API. Prints one JSON object for its first certificate, and one for
the certificate that replaces it. SPIFFE's client for Python knows Unix sockets only, so a thread connects one to the API.
"""

import asyncio
import json
import os
import threading

from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from spiffe import TrustDomain, WorkloadApiClient, X509Source
from spiffe.errors import PySpiffeError

HOST, PORT = "127.0.0.1", 15082
# In the working directory: gRPC makes an :authority of the path, which is malformed if it has slashes.
SOCKET = "workload-api.sock"
SECONDS = 30


async def copy(reader, writer):
    while data := await reader.read(1 << 16):
        writer.write(data)
        await writer.drain()
    writer.close()


async def bridge(ready):
    async def serve(reader, writer):
        api_reader, api_writer = await asyncio.open_connection(HOST, PORT)
        await asyncio.gather(copy(reader, api_writer), copy(api_reader, writer))

    server = await asyncio.start_unix_server(serve, SOCKET)
    ready.set()
    await server.serve_forever()


def public_bytes(key):
    return key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


def show(source):
    context = source.get_x509_context()
    svid = context.default_svid
    number = format(svid.leaf.serial_number, "x")
    bundle = source.get_bundle_for_trust_domain(svid.spiffe_id.trust_domain)
    (root,) = bundle.x509_authorities
    # Raises an exception unless the root has signed it.
    svid.leaf.verify_directly_issued_by(root)
    if public_bytes(svid.leaf.public_key()) != public_bytes(svid.private_key.public_key()):
        raise ValueError("the key is another certificate's")
    print(json.dumps({"id": str(svid.spiffe_id), "serial": number}), flush=True)
    return number


def serial(source):
    return format(source.get_x509_context().default_svid.leaf.serial_number, "x")


def main():
    ready = threading.Event()
    threading.Thread(target=asyncio.run, args=[bridge(ready)], daemon=True).start()
    ready.wait(SECONDS)
    os.environ["SPIFFE_ENDPOINT_SOCKET"] = f"unix:{SOCKET}"
    changed = threading.Event()
    with X509Source(timeout_in_seconds=SECONDS) as source:
        source.subscribe_for_updates(changed.set)
        first = show(source)
        # A certificate that came before the first was shown has also set it.
        while serial(source) == first:
            if not changed.wait(SECONDS):
                raise TimeoutError("no other certificate")
            changed.clear()
        show(source)
    with WorkloadApiClient() as client:
        domain = TrustDomain("cluster.local")
        roots = client.fetch_x509_bundles().get_bundle_for_trust_domain(domain)
        try:
            client.fetch_jwt_svid(audience={"x"})
            jwt = "issued"
        except PySpiffeError as error:
            jwt = str(error)
    print(json.dumps({"roots": len(roots.x509_authorities), "jwt": jwt}))


main()

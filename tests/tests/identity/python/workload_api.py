"""An app that gets its certificate by the SPIFFE Workload API, at the address in SPIFFE_ENDPOINT_SOCKET. Prints one JSON object for
its first certificate, one for the certificate that replaces it, and one for the roots and a JWT-SVID.
"""

import json
import threading

from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from spiffe import JwtSvid, TrustDomain, WorkloadApiClient, X509Source
from spiffe.errors import PySpiffeError

SECONDS = 30


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
        jwt = client.fetch_jwt_svid(audience={"db", "queue"})
        keys = client.fetch_jwt_bundles().get_bundle_for_trust_domain(domain)
        # Both raise an exception unless the token is valid.
        JwtSvid.parse_and_validate(jwt.token, keys, {"db"})
        valid = client.validate_jwt_svid(jwt.token, "queue")
        try:
            client.validate_jwt_svid(jwt.token, "other")
            refused = "nothing"
        except PySpiffeError as error:
            refused = str(error)
    shown = {
        "roots": len(roots.x509_authorities),
        "keys": len(keys.jwt_authorities),
        "jwt": str(valid.spiffe_id),
        "refused": refused,
    }
    print(json.dumps(shown))


main()

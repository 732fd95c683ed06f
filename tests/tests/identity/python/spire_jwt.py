"""An app of our trust domain and JWT-SVIDs of another one. Arguments: a token of the other one for "ours", and a file with the
bundle that the other one has of ours, a SPIFFE bundle document. Prints one JSON object.
"""

import json
import sys

from spiffe import JwtBundle, JwtSvid, TrustDomain, WorkloadApiClient


def main():
    token, file = sys.argv[1:]
    with open(file) as document:
        keys = [key for key in json.load(document)["keys"] if key["use"] == "jwt-svid"]
    theirs = JwtBundle.parse(TrustDomain("cluster.local"), json.dumps({"keys": keys}).encode())
    with WorkloadApiClient() as client:
        foreign = client.validate_jwt_svid(token, "ours")
        own = client.fetch_jwt_svid(audience={"theirs"})
        bundles = client.fetch_jwt_bundles()
        bundle = bundles.get_bundle_for_trust_domain(foreign.spiffe_id.trust_domain)
    # Each raises an exception unless the token is valid.
    JwtSvid.parse_and_validate(token, bundle, {"ours"})
    JwtSvid.parse_and_validate(own.token, theirs, {"theirs"})
    print(json.dumps({"foreign": str(foreign.spiffe_id), "own": str(own.spiffe_id)}))


main()

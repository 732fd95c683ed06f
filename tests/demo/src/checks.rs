//! The checks of the demo, in the order in which they run.

use anyhow::Result;

use super::evidence::Evidence;
use super::stage::Stage;
use super::{
    addresses, bulk, ca, claims, entrances, failure, federated, identity, lives, outside, person,
    policy, same_node, seen, wire, workload_api,
};

/// A single check of the demo.
pub(super) struct Check {
    pub(super) name: &'static str,
    /// The claim, in a few words.
    pub(super) claim: &'static str,
    pub(super) run: fn(&mut Stage, &Evidence) -> Result<()>,
}

pub(super) const BEFORE: [Check; 1] = [Check {
    name: "plaintext-before",
    claim: "without the daemon, request and answer are readable between the nodes",
    run: wire::plaintext_before,
}];

pub(super) const AFTER: [Check; 34] = [
    Check {
        name: "ca-issued",
        claim: "the certificates of both nodes come from one CA, on a third host",
        run: ca::ca_issued,
    },
    Check {
        name: "mtls-on-wire",
        claim: "with it, the same request crosses in TLS 1.3 records and nothing else",
        run: wire::mtls_on_wire,
    },
    Check {
        name: "peer-address-kept",
        claim: "nginx logs the client pod's address, and curl sees the server's",
        run: addresses::peer_address_kept,
    },
    Check {
        name: "port-kept",
        claim: "firewalls between the nodes see the app's own port",
        run: addresses::port_kept,
    },
    Check {
        name: "service-address",
        claim: "a service's address leads to all its endpoints",
        run: addresses::service_address,
    },
    Check {
        name: "identity-in-log",
        claim: "both daemons log who called whom",
        run: identity::identity_in_log,
    },
    Check {
        name: "same-node",
        claim: "two pods of one node talk in its kernel, and the log says who",
        run: same_node::same_node,
    },
    Check {
        name: "secure-naming",
        claim: "a server of another account is refused before it gets a byte",
        run: identity::secure_naming,
    },
    Check {
        name: "plaintext-refused",
        claim: "a caller without a certificate does not reach the app (STRICT)",
        run: outside::plaintext_refused,
    },
    Check {
        name: "observe",
        claim: "the daemon shows who called whom, and what was refused and why",
        run: seen::observe,
    },
    Check {
        name: "non-mesh-untouched",
        claim: "a connection to a host outside of the mesh passes no daemon",
        run: outside::non_mesh_untouched,
    },
    Check {
        name: "service-on-node-address",
        claim: "a service whose address is also the node's is reached in TLS",
        run: claims::service_on_node_address,
    },
    Check {
        name: "node-port-tunnelled",
        claim: "a pod that dials a node port, of its own node or the server's, is tunnelled",
        run: claims::node_port_tunnelled,
    },
    Check {
        name: "removed-address",
        claim: "the address of a pod that was removed is refused while its server still runs",
        run: claims::removed_address,
    },
    Check {
        name: "still-running",
        claim: "a pod whose object has failed keeps its protection while its server runs",
        run: lives::still_running,
    },
    Check {
        name: "ipv6",
        claim: "all of that over IPv6",
        run: addresses::ipv6,
    },
    Check {
        name: "bulk-transfer",
        claim: "iperf3 streams both ways through the tunnel",
        run: bulk::bulk_transfer,
    },
    Check {
        name: "rotation-live",
        claim: "certificates are renewed under load, and no request fails",
        run: ca::rotation_live,
    },
    Check {
        name: "root-rotation",
        claim: "the CA's root is replaced under load, and no request fails",
        run: ca::root_rotation,
    },
    Check {
        name: "revoked",
        claim: "a revoked identity's open connection ends within two seconds, and no new one opens",
        run: ca::revoked,
    },
    Check {
        name: "workload-api",
        claim: "an app of a listed account gets a certificate and key of its own, and no other app does",
        run: workload_api::workload_api,
    },
    Check {
        name: "federated",
        claim: "workloads of two trust domains reach each other while both sides' entries say so",
        run: federated::federated,
    },
    Check {
        name: "person-connects",
        claim: "a person outside the mesh reaches a STRICT service as an account, and the log says who it was",
        run: person::person_connects,
    },
    Check {
        name: "policy-deny",
        claim: "a policy refuses one account and no other, and the log names the policy",
        run: policy::policy_deny,
    },
    Check {
        name: "policy-live",
        claim: "a policy that comes into force ends what it denies within a second, and nothing else",
        run: policy::policy_live,
    },
    Check {
        name: "suggested-policy",
        claim: "policies suggested from what was seen allow that and nothing else",
        run: seen::suggested_policy,
    },
    Check {
        name: "strict-refuses-plaintext",
        claim: "PeerAuthentication decides whether plaintext is accepted",
        run: policy::strict_refuses_plaintext,
    },
    Check {
        name: "open-plaintext-ends",
        claim: "plaintext that is open when STRICT begins ends within two seconds",
        run: lives::open_plaintext_ends,
    },
    Check {
        name: "second-address",
        claim: "an address of the pod that no object lists is as closed as the pod",
        run: entrances::second_address,
    },
    Check {
        name: "node-port",
        claim: "a caller translated to the node's address does not pass as the node",
        run: entrances::node_port,
    },
    Check {
        name: "host-network",
        claim: "a pod in the node's network does not pass as the node",
        run: entrances::host_network,
    },
    Check {
        name: "nested-namespace",
        claim: "a pod forwards nothing from outside to a namespace nested in it",
        run: entrances::nested_namespace,
    },
    Check {
        name: "fail-closed",
        claim: "a killed daemon means refused connections, never plaintext; a new one takes over",
        run: failure::fail_closed,
    },
    Check {
        name: "unload",
        claim: "unloading leaves nothing behind, and the pods communicate in plaintext again",
        run: failure::unload,
    },
];

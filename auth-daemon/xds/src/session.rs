//! Delta ADS (<https://www.envoyproxy.io/docs/envoy/latest/api-docs/xds_protocol>): subscribes to all resources of two types,
//! and remembers their versions, so that the next stream sends only what has changed.

use std::{collections::HashMap, sync::Arc};

use auth_mesh::{Service, WaypointAt, policy::api::Object};
use prost::Message;
use prost_types::{Struct, Value, value::Kind};

use crate::{
    authorization::policy,
    discovery::{DeltaDiscoveryRequest, DeltaDiscoveryResponse, Node, Resource, Status},
    read::{Mesh, name},
    service::service,
    workload::{FoundWorkload, workload},
    workload_api::{Address, address},
};

/// Type of workloads and services.
pub const ADDRESS_TYPE: &str = "type.googleapis.com/istio.workload.Address";
/// Type of policies.
pub const AUTHORIZATION_TYPE: &str = "type.googleapis.com/istio.security.Authorization";

/// Maximum number of resources of a type.
const MAX_RESOURCES: usize = 1_000_000;
/// Maximum number of rejected resources that a NACK explains.
const MAX_REASONS: usize = 8;
/// `google.rpc.Code.INVALID_ARGUMENT`
const INVALID_ARGUMENT: i32 = 3;

/// Who subscribes.
#[derive(Clone, Debug)]
pub struct Caller {
    /// Name of the daemon's pod.
    pub pod: String,
    /// The daemon's own namespace, which its token proves.
    pub namespace: String,
    /// The node.
    pub node: String,
}

/// A subscription, over all streams that carry it.
#[derive(Debug)]
pub struct Session {
    mesh: Mesh,
    caller: Caller,
    addresses: Kept,
    authorizations: Kept,
}

/// What is known of one type.
#[derive(Debug, Default)]
struct Kept {
    /// The resources that have been received and not removed, by name.
    held: HashMap<String, Held>,
    /// Whether a response has arrived, on any stream. The first one holds all resources.
    complete: bool,
}

/// A resource that the client has.
#[derive(Debug)]
struct Held {
    /// Its version, as istiod calls it.
    version: String,
    /// Whether it could be read, now or in an earlier version.
    is_good: bool,
}

/// A change of a resource.
#[derive(Clone, Debug, PartialEq)]
pub enum Change {
    /// The workload of this resource name is new, or has changed.
    Workload(String, Box<FoundWorkload>),
    /// The service of this resource name is new, or has changed.
    Service(String, Box<Service>),
    /// The workload or service of this resource name is gone.
    NoAddress(String),
    /// The policy of this resource name is new, or has changed.
    Policy(String, Arc<Object>),
    /// The policy of this resource name is gone.
    NoPolicy(String),
}

/// What became of a response.
#[derive(Clone, Debug)]
pub struct Taken {
    /// The changes, in order.
    pub changes: Vec<Change>,
    /// The acknowledgement (ACK), or the reasons for a rejection (NACK), to send.
    pub answer: DeltaDiscoveryRequest,
    /// Why resources were rejected.
    pub rejected: Vec<String>,
}

impl Session {
    /// Creates a session that has no resources yet.
    pub fn new(mesh: Mesh, caller: Caller) -> Self {
        Self {
            mesh,
            caller,
            addresses: Kept::default(),
            authorizations: Kept::default(),
        }
    }

    /// Returns the requests that begin a stream.
    pub fn open(&self) -> [DeltaDiscoveryRequest; 2] {
        // Policies first, because workloads refer to them.
        let kinds = [
            (AUTHORIZATION_TYPE, &self.authorizations),
            (ADDRESS_TYPE, &self.addresses),
        ];
        let requests = kinds.map(|(type_url, kept)| DeltaDiscoveryRequest {
            type_url: type_url.into(),
            resource_names_subscribe: vec!["*".into()],
            initial_resource_versions: kept.versions(),
            ..Default::default()
        });
        let [first, second] = requests;
        let first = DeltaDiscoveryRequest {
            node: Some(self.node()),
            ..first
        };
        [first, second]
    }

    /// Reports whether all resources of both types were received once.
    pub fn is_complete(&self) -> bool {
        self.addresses.complete && self.authorizations.complete
    }

    /// Returns the number of known resources.
    pub fn count(&self) -> usize {
        self.addresses.held.len() + self.authorizations.held.len()
    }

    /// Takes a response. Each resource counts by itself: one that cannot be read keeps its last good version.
    pub fn take(&mut self, response: DeltaDiscoveryResponse) -> Taken {
        let mut answer = DeltaDiscoveryRequest {
            type_url: response.type_url.clone(),
            response_nonce: response.nonce,
            ..Default::default()
        };
        let (mut changes, mut rejected) = (Vec::new(), Vec::new());
        let is_policy = response.type_url == AUTHORIZATION_TYPE;
        let kept = match response.type_url.as_str() {
            ADDRESS_TYPE => Some(&mut self.addresses),
            AUTHORIZATION_TYPE => Some(&mut self.authorizations),
            _ => None,
        };
        if let Some(kept) = kept {
            for removed in response.removed_resources {
                if kept.held.remove(&removed).is_some() {
                    changes.push(match is_policy {
                        true => Change::NoPolicy(removed),
                        false => Change::NoAddress(removed),
                    });
                }
            }
            for resource in response.resources {
                let (own_name, version) = (resource.name.clone(), resource.version.clone());
                let before = kept.held.get(&own_name);
                if before.is_none() && kept.held.len() >= MAX_RESOURCES {
                    rejected.push(format!("more than {MAX_RESOURCES} resources"));
                    break;
                }
                let has_good = before.is_some_and(|before| before.is_good);
                let read = match is_policy {
                    true => read_policy(resource, has_good, &self.mesh),
                    false => read_address(resource, &self.mesh),
                };
                match read {
                    Ok((change, error)) => {
                        let is_good = error.is_none();
                        rejected.extend(error);
                        kept.held.insert(own_name, Held { version, is_good });
                        changes.push(change);
                    }
                    Err(error) => rejected.push(error),
                }
            }
            kept.complete = true;
        } else {
            rejected.push("the type is not subscribed to".into());
        }
        if !rejected.is_empty() {
            let first = &rejected[..rejected.len().min(MAX_REASONS)];
            answer.error_detail = Some(Status {
                code: INVALID_ARGUMENT,
                message: format!("{} rejected: {}", rejected.len(), first.join("; ")),
            });
        }
        Taken {
            changes,
            answer,
            rejected,
        }
    }

    /// Describes the daemon as istiod expects it of a node proxy (`TYPE~IP~ID~DOMAIN`).
    fn node(&self) -> Node {
        let Caller {
            pod,
            namespace,
            node,
        } = &self.caller;
        let text = |text: &str| Value {
            kind: Some(Kind::StringValue(text.to_owned())),
        };
        let fields = [
            ("NAME", pod.as_str()),
            ("NAMESPACE", namespace),
            ("NODE_NAME", node),
            ("CLUSTER_ID", &self.mesh.cluster),
            ("NETWORK", &self.mesh.network),
        ];
        Node {
            // The address is of no use to istiod for a subscription to everything.
            id: format!("ztunnel~127.0.0.1~{pod}.{namespace}~{namespace}.svc.cluster.local"),
            metadata: Some(Struct {
                fields: fields
                    .map(|(key, value)| (key.to_owned(), text(value)))
                    .into(),
            }),
        }
    }
}

impl Kept {
    fn versions(&self) -> std::collections::BTreeMap<String, String> {
        let held = self.held.iter();
        held.map(|(name, held)| (name.clone(), held.version.clone()))
            .collect()
    }
}

/// A change, and why a policy or waypoint is not followed as it is.
type Read = Result<(Change, Option<String>), String>;

fn read_address(resource: Resource, mesh: &Mesh) -> Read {
    let failed = |error: String| format!("{:?}: {error}", shortened(&resource.name));
    name("name", &resource.name).map_err(&failed)?;
    let bytes = value(&resource, ADDRESS_TYPE).map_err(&failed)?;
    let found = Address::decode(bytes).map_err(|error| failed(error.to_string()))?;
    let own_name = resource.name.clone();
    let (change, waypoint) = match found.r#type {
        Some(address::Type::Workload(found)) => {
            let found = workload(found, mesh).map_err(&failed)?;
            let waypoint = found.workload.waypoint.clone();
            (Change::Workload(own_name, Box::new(found)), waypoint)
        }
        Some(address::Type::Service(found)) => {
            let found = service(found, mesh).map_err(&failed)?;
            let waypoint = found.waypoint.clone();
            (Change::Service(own_name, Box::new(found)), waypoint)
        }
        None => return Err(failed("is neither a workload nor a service".into())),
    };
    let unusable = waypoint.and_then(|waypoint| match &waypoint.at {
        WaypointAt::Unusable(reason) => Some(reason.clone()),
        _ => None,
    });
    Ok((change, unusable.map(failed)))
}

fn read_policy(resource: Resource, has_good: bool, mesh: &Mesh) -> Read {
    let failed = |error: String| format!("{:?}: {error}", shortened(&resource.name));
    let bytes = value(&resource, AUTHORIZATION_TYPE);
    let read = policy(&resource.name, bytes, mesh).map_err(&failed)?;
    match read.error {
        // The last good version stays in force.
        Some(error) if has_good => Err(failed(error)),
        error => Ok((
            Change::Policy(resource.name.clone(), read.object),
            error.map(failed),
        )),
    }
}

fn value<'a>(resource: &'a Resource, type_url: &str) -> Result<&'a [u8], String> {
    match &resource.resource {
        Some(any) if any.type_url == type_url => Ok(&any.value),
        Some(any) => Err(format!("is a {:?}", shortened(&any.type_url))),
        None => Err("is empty".into()),
    }
}

fn shortened(text: &str) -> String {
    text.chars().take(256).collect()
}

#[cfg(test)]
mod tests;

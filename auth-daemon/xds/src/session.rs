//! Delta ADS (<https://www.envoyproxy.io/docs/envoy/latest/api-docs/xds_protocol>): subscribes to all policies, and to all
//! workloads and services or those that are asked for. Remembers the versions, so that the next stream sends only what has
//! changed.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    net::IpAddr,
    sync::Arc,
};

use auth_mesh::{Service, WaypointAt, policy::api::Object};
use prost::Message;
use prost_types::{Struct, Value, value::Kind};

use crate::{
    authorization::policy,
    demand::{Answer, Demand, Links, Names},
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
    /// `None` if all workloads and services are subscribed to.
    demand: Option<Demand>,
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
    /// Of names on demand alone.
    links: Option<Box<Links>>,
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
    /// What has the requested addresses. These answers take effect together with the changes.
    pub answered: Vec<(IpAddr, Answer)>,
}

impl Session {
    /// Creates a session that has no resources yet, and subscribes to all.
    pub fn new(mesh: Mesh, caller: Caller) -> Self {
        Self {
            mesh,
            caller,
            addresses: Kept::default(),
            authorizations: Kept::default(),
            demand: None,
        }
    }

    /// Creates a session that subscribes to all policies, but to workloads and services only as [`Session::ask`] needs them.
    pub fn on_demand(mesh: Mesh, caller: Caller) -> Self {
        Self {
            demand: Some(Demand::default()),
            ..Self::new(mesh, caller)
        }
    }

    /// Asks what has these addresses. For a session on demand; [`Session::requests`] returns what to send.
    pub fn ask(&mut self, addresses: impl IntoIterator<Item = IpAddr>) {
        if let Some(demand) = &mut self.demand {
            demand.ask(addresses);
        }
    }

    /// Reports whether istiod has been asked for addresses, and has not answered yet.
    pub fn is_waiting(&self) -> bool {
        self.demand.as_ref().is_some_and(Demand::is_waiting)
    }

    /// Returns what to send because of [`Session::ask`] or a response, in order.
    pub fn requests(&mut self) -> Vec<DeltaDiscoveryRequest> {
        let Some(demand) = &mut self.demand else {
            return Vec::new();
        };
        let requests = demand.requests(&self.mesh).into_iter();
        requests.map(subscription).collect()
    }

    /// Forgets what none of the `used` addresses needs. Returns the changes, and what to send.
    pub fn release(
        &mut self,
        used: &HashSet<IpAddr>,
    ) -> (Vec<Change>, Option<DeltaDiscoveryRequest>) {
        let Some(demand) = &mut self.demand else {
            return (Vec::new(), None);
        };
        let linked = self.addresses.held.iter();
        let links = linked.filter_map(|(name, held)| Some((name, held.links.as_deref()?)));
        let (released, request) = demand.release(used, &links.collect(), &self.mesh);
        for name in &released {
            self.addresses.held.remove(name);
        }
        let changes = released.into_iter().map(Change::NoAddress).collect();
        (changes, request.map(subscription))
    }

    /// Returns the requests that begin a stream.
    pub fn open(&mut self) -> [DeltaDiscoveryRequest; 2] {
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
        let [first, mut second] = requests;
        if let Some(demand) = &mut self.demand {
            let held = &self.addresses.held;
            let names = demand.open(held.keys());
            second.resource_names_subscribe.extend(names);
            // By this, istiod sends nothing else.
            second.resource_names_unsubscribe = vec!["*".into()];
            // What answers the batch is to be sent whether it has changed or not.
            let waits_for = |name: &String| {
                let links = held.get(name).and_then(|held| held.links.as_deref());
                demand.waits_for(name, links)
            };
            let resumed = std::mem::take(&mut second.initial_resource_versions).into_iter();
            let (anew, resumed): (BTreeMap<_, _>, _) =
                resumed.partition(|(name, _)| waits_for(name));
            second.resource_names_subscribe.extend(anew.into_keys());
            second.initial_resource_versions = resumed;
        }
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

    /// Takes a response. Each resource is handled separately: one that cannot be read keeps its last good version.
    pub fn take(&mut self, response: DeltaDiscoveryResponse) -> Taken {
        let mut answer = DeltaDiscoveryRequest {
            type_url: response.type_url.clone(),
            response_nonce: response.nonce,
            ..Default::default()
        };
        let (mut changes, mut rejected, mut answered) = (Vec::new(), Vec::new(), Vec::new());
        let is_policy = response.type_url == AUTHORIZATION_TYPE;
        let kept = match response.type_url.as_str() {
            ADDRESS_TYPE => Some(&mut self.addresses),
            AUTHORIZATION_TYPE => Some(&mut self.authorizations),
            _ => None,
        };
        if let Some(kept) = kept {
            let mut demand = self.demand.as_mut().filter(|_| !is_policy);
            for removed in response.removed_resources {
                if let Some(demand) = &mut demand {
                    demand.note([&removed].into_iter(), &Answer::Absent, None);
                }
                if kept.held.remove(&removed).is_some() {
                    changes.push(match is_policy {
                        true => Change::NoPolicy(removed),
                        false => Change::NoAddress(removed),
                    });
                }
            }
            for mut resource in response.resources {
                let (own_name, version) = (resource.name.clone(), resource.version.clone());
                let aliases = std::mem::take(&mut resource.aliases);
                let before = kept.held.get(&own_name);
                if before.is_none() && kept.held.len() >= MAX_RESOURCES {
                    rejected.push(format!("more than {MAX_RESOURCES} resources"));
                    break;
                }
                let (is_known, has_good) = (
                    before.is_some(),
                    before.is_some_and(|before| before.is_good),
                );
                let links = demand.as_mut().map(|demand| {
                    demand.received(&own_name);
                    Box::new(links(&resource, aliases, &self.caller.node))
                });
                let read = match is_policy {
                    true => read_policy(resource, has_good, &self.mesh),
                    false => read_address(resource, &self.mesh),
                };
                if let (Some(demand), Some(links)) = (&mut demand, &links) {
                    let answer = match &read {
                        Ok(_) => Answer::Known,
                        // The last good version stays in force.
                        Err(_) if is_known => Answer::Known,
                        Err(error) => Answer::Rejected(error.clone()),
                    };
                    let names = links.aliases.iter().chain([&own_name]);
                    demand.note(names, &answer, Some(links));
                }
                match read {
                    Ok((change, error)) => {
                        let is_good = error.is_none();
                        rejected.extend(error);
                        let held = Held {
                            version,
                            is_good,
                            links,
                        };
                        kept.held.insert(own_name, held);
                        changes.push(change);
                    }
                    Err(error) => rejected.push(error),
                }
            }
            answered = demand.map_or_else(Vec::new, Demand::answered);
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
            answered,
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
    fn versions(&self) -> BTreeMap<String, String> {
        let held = self.held.iter();
        held.map(|(name, held)| (name.clone(), held.version.clone()))
            .collect()
    }
}

fn subscription((subscribe, unsubscribe): Names) -> DeltaDiscoveryRequest {
    DeltaDiscoveryRequest {
        type_url: ADDRESS_TYPE.into(),
        resource_names_subscribe: subscribe,
        resource_names_unsubscribe: unsubscribe,
        ..Default::default()
    }
}

/// Reads what connects the resource with others, as far as it can be read.
fn links(resource: &Resource, aliases: Vec<String>, node: &str) -> Links {
    let bytes = value(resource, ADDRESS_TYPE).unwrap_or_default();
    let found = Address::decode(bytes).unwrap_or_default();
    Links::of(&found, aliases, node)
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

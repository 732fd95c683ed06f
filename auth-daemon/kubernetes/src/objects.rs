//! Objects of the Kubernetes API, with only the fields that the mesh uses. All other fields are skipped while parsing
//! and never stored.

use std::{borrow::Cow, collections::BTreeMap};

use k8s_openapi::{
    api::{core::v1, discovery::v1 as discovery, networking::v1 as networking},
    apimachinery::pkg::{
        apis::meta::v1::{ObjectMeta, Time},
        util::intstr::IntOrString,
    },
};
use kube::{
    Resource,
    core::{ApiResource, DynamicResourceScope},
};
use serde::{Deserialize, Deserializer, de::Error};
use serde_json::Value;

/// A pod.
#[derive(Clone, Debug, Default, Deserialize)]
pub struct Pod {
    /// Standard metadata: name, labels and so on.
    #[serde(default, deserialize_with = "metadata")]
    pub metadata: ObjectMeta,
    /// Desired state.
    #[serde(default, deserialize_with = "or_default")]
    pub spec: PodSpec,
    /// Observed state.
    #[serde(default, deserialize_with = "or_default")]
    pub status: PodStatus,
}

/// Desired state of a pod.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PodSpec {
    /// Node that the pod is bound to.
    pub node_name: Option<String>,
    /// Name of the pod's service account.
    pub service_account_name: Option<String>,
    /// Whether the pod uses the node's network namespace.
    pub host_network: Option<bool>,
    /// Containers.
    #[serde(default, deserialize_with = "or_default")]
    pub containers: Vec<Container>,
    /// Init containers, including sidecars that keep running beside the containers.
    #[serde(default, deserialize_with = "or_default")]
    pub init_containers: Vec<Container>,
}

/// A container of a pod.
#[derive(Clone, Debug, Default, Deserialize)]
pub struct Container {
    /// Declared ports.
    #[serde(default, deserialize_with = "or_default")]
    pub ports: Vec<ContainerPort>,
}

/// A port of a container.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ContainerPort {
    /// Name, by which a service may refer to the port.
    pub name: Option<String>,
    /// Port number.
    pub container_port: i32,
    /// Protocol. Defaults to `TCP`.
    pub protocol: Option<String>,
    /// Port of the node at which the port is exposed.
    pub host_port: Option<i32>,
    /// Address of the node at which `host_port` is exposed. Defaults to all of them.
    #[serde(rename = "hostIP")]
    pub host_ip: Option<String>,
}

/// Observed state of a pod.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PodStatus {
    /// `Pending`, `Running`, `Succeeded`, `Failed` or `Unknown`.
    pub phase: Option<String>,
    /// Primary address.
    #[serde(rename = "podIP")]
    pub pod_ip: Option<String>,
    /// All addresses.
    #[serde(rename = "podIPs", default, deserialize_with = "or_default")]
    pub pod_ips: Vec<PodIp>,
    /// Primary address of the pod's node.
    #[serde(rename = "hostIP")]
    pub host_ip: Option<String>,
    /// All addresses of the pod's node, at most one of each family.
    #[serde(rename = "hostIPs", default, deserialize_with = "or_default")]
    pub host_ips: Vec<PodIp>,
    /// Conditions, such as `Ready`.
    #[serde(default, deserialize_with = "or_default")]
    pub conditions: Vec<Condition>,
}

/// An address of a pod or its node.
#[derive(Clone, Debug, Default, Deserialize)]
pub struct PodIp {
    /// The address, as text.
    #[serde(default)]
    pub ip: String,
}

/// A condition of an object.
#[derive(Clone, Debug, Deserialize)]
pub struct Condition {
    /// Type of the condition.
    #[serde(rename = "type")]
    pub type_: String,
    /// `True`, `False` or `Unknown`.
    pub status: String,
}

/// A service.
#[derive(Clone, Debug, Default, Deserialize)]
pub struct Service {
    /// Standard metadata: name, labels and so on.
    #[serde(default, deserialize_with = "metadata")]
    pub metadata: ObjectMeta,
    /// Desired state.
    #[serde(default, deserialize_with = "or_default")]
    pub spec: ServiceSpec,
    /// Observed state.
    #[serde(default, deserialize_with = "or_default")]
    pub status: ServiceStatus,
}

/// Observed state of a service.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ServiceStatus {
    /// The service's load balancer.
    #[serde(default, deserialize_with = "or_default")]
    pub load_balancer: LoadBalancer,
}

/// A load balancer of a service.
#[derive(Clone, Debug, Default, Deserialize)]
pub struct LoadBalancer {
    /// Where the load balancer accepts connections.
    #[serde(default, deserialize_with = "or_default")]
    pub ingress: Vec<Ingress>,
}

/// An address or name of a load balancer.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Ingress {
    /// The address, if it has no name.
    pub ip: Option<String>,
    /// `VIP`, the default, or `Proxy` if nodes must send connections to the load balancer itself.
    pub ip_mode: Option<String>,
}

/// Desired state of a service.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ServiceSpec {
    /// `ClusterIP`, `ExternalName` or another type.
    #[serde(rename = "type")]
    pub type_: Option<String>,
    /// Primary virtual address, or the text `None`.
    #[serde(rename = "clusterIP")]
    pub cluster_ip: Option<String>,
    /// All virtual addresses.
    #[serde(rename = "clusterIPs", default, deserialize_with = "or_default")]
    pub cluster_ips: Vec<String>,
    /// Labels that select the service's pods.
    #[serde(default, deserialize_with = "or_default")]
    pub selector: BTreeMap<String, String>,
    /// Ports.
    #[serde(default, deserialize_with = "or_default")]
    pub ports: Vec<ServicePort>,
    /// Further addresses at which the service's ports are exposed.
    #[serde(rename = "externalIPs", default, deserialize_with = "or_default")]
    pub external_ips: Vec<String>,
    /// Whether pods that are not ready are included.
    pub publish_not_ready_addresses: Option<bool>,
    /// `ClientIP` if a client is always sent to the same pod.
    pub session_affinity: Option<String>,
    /// `Local` if only pods on the client's node are used.
    pub internal_traffic_policy: Option<String>,
}

/// A port of a service.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ServicePort {
    /// Name, by which endpoint slices refer to the port.
    pub name: Option<String>,
    /// Port of the virtual address.
    pub port: i32,
    /// Protocol. Defaults to `TCP`.
    pub protocol: Option<String>,
    /// Port of the pods. Defaults to `port`.
    pub target_port: Option<IntOrString>,
    /// Port at which every node exposes the port, for services of type `NodePort` and `LoadBalancer`.
    pub node_port: Option<i32>,
}

/// A node.
#[derive(Clone, Debug, Default, Deserialize)]
pub struct Node {
    /// Standard metadata: name, annotations and so on.
    #[serde(default, deserialize_with = "metadata")]
    pub metadata: ObjectMeta,
    /// Desired state.
    #[serde(default, deserialize_with = "or_default")]
    pub spec: NodeSpec,
    /// Observed state.
    #[serde(default, deserialize_with = "or_default")]
    pub status: NodeStatus,
}

/// Desired state of a node.
#[derive(Clone, Debug, Default, Deserialize)]
pub struct NodeSpec {
    /// Network of the node's pods.
    #[serde(rename = "podCIDR")]
    pub pod_cidr: Option<String>,
    /// All networks of the node's pods, at most one of each family.
    #[serde(rename = "podCIDRs", default, deserialize_with = "or_default")]
    pub pod_cidrs: Vec<String>,
}

/// Observed state of a node.
#[derive(Clone, Debug, Default, Deserialize)]
pub struct NodeStatus {
    /// Addresses and names.
    #[serde(default, deserialize_with = "or_default")]
    pub addresses: Vec<NodeAddress>,
}

/// An address or name of a node.
#[derive(Clone, Debug, Deserialize)]
pub struct NodeAddress {
    /// `InternalIP`, `ExternalIP`, `Hostname` or another type.
    #[serde(rename = "type")]
    pub type_: String,
    /// The address or name.
    pub address: String,
}

/// Networks that the cluster takes the virtual addresses of services from (Kubernetes 1.33).
#[derive(Clone, Debug, Default, Deserialize)]
pub struct ServiceCidr {
    /// Standard metadata: name, labels and so on.
    #[serde(default, deserialize_with = "metadata")]
    pub metadata: ObjectMeta,
    /// Desired state.
    #[serde(default, deserialize_with = "or_default")]
    pub spec: ServiceCidrSpec,
}

/// Desired state of a service network.
#[derive(Clone, Debug, Default, Deserialize)]
pub struct ServiceCidrSpec {
    /// The networks, at most one of each family.
    #[serde(default, deserialize_with = "or_default")]
    pub cidrs: Vec<String>,
}

/// A namespace.
#[derive(Clone, Debug, Default, Deserialize)]
pub struct Namespace {
    /// Standard metadata: name, labels and so on.
    #[serde(default, deserialize_with = "metadata")]
    pub metadata: ObjectMeta,
}

/// A service account.
#[derive(Clone, Debug, Default, Deserialize)]
pub struct ServiceAccount {
    /// Standard metadata: name, labels and so on.
    #[serde(default, deserialize_with = "metadata")]
    pub metadata: ObjectMeta,
}

/// A slice of a service's endpoints.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct EndpointSlice {
    /// Standard metadata: name, labels and so on.
    #[serde(default, deserialize_with = "metadata")]
    pub metadata: ObjectMeta,
    /// `IPv4`, `IPv6` or `FQDN`.
    #[serde(default)]
    pub address_type: String,
    /// Endpoints.
    #[serde(default, deserialize_with = "or_default")]
    pub endpoints: Vec<SliceEndpoint>,
    /// Ports that all endpoints of the slice have.
    #[serde(default, deserialize_with = "or_default")]
    pub ports: Vec<SlicePort>,
}

/// An endpoint of a slice.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct SliceEndpoint {
    /// Addresses, as text. Only the first one is used, because the API does not define the meaning of the others.
    #[serde(default, deserialize_with = "or_default")]
    pub addresses: Vec<String>,
    /// The object that the endpoint represents.
    pub target_ref: Option<TargetRef>,
    /// Node that the endpoint is on.
    pub node_name: Option<String>,
    /// Conditions that determine whether the endpoint may be used.
    #[serde(default, deserialize_with = "or_default")]
    pub conditions: SliceConditions,
}

/// Conditions of an endpoint.
#[derive(Clone, Debug, Default, Deserialize)]
pub struct SliceConditions {
    /// Whether it accepts connections. Defaults to true.
    pub ready: Option<bool>,
    /// Like `ready`, but ignores termination. Defaults to `ready`.
    pub serving: Option<bool>,
    /// Whether it is terminating. Defaults to false.
    pub terminating: Option<bool>,
}

/// Reference to the object that an endpoint represents.
#[derive(Clone, Debug, Default, Deserialize)]
pub struct TargetRef {
    /// Kind of the object, such as `Pod`.
    pub kind: Option<String>,
    /// Namespace of the object.
    pub namespace: Option<String>,
    /// Name of the object.
    pub name: Option<String>,
}

/// A port of a slice's endpoints.
#[derive(Clone, Debug, Default, Deserialize)]
pub struct SlicePort {
    /// Name of the service's port.
    pub name: Option<String>,
    /// Port number. `None` stands for all ports.
    pub port: Option<i32>,
    /// Protocol. Defaults to `TCP`.
    pub protocol: Option<String>,
}

macro_rules! resource {
    ($($own:ty: $api:ty),* $(,)?) => {$(
        impl Resource for $own {
            type DynamicType = ();
            type Scope = <$api as Resource>::Scope;

            fn kind(_: &()) -> Cow<'_, str> {
                <$api as Resource>::kind(&())
            }

            fn group(_: &()) -> Cow<'_, str> {
                <$api as Resource>::group(&())
            }

            fn version(_: &()) -> Cow<'_, str> {
                <$api as Resource>::version(&())
            }

            fn plural(_: &()) -> Cow<'_, str> {
                <$api as Resource>::plural(&())
            }

            fn meta(&self) -> &ObjectMeta {
                &self.metadata
            }

            fn meta_mut(&mut self) -> &mut ObjectMeta {
                &mut self.metadata
            }
        }
    )*};
}

resource! {
    Pod: v1::Pod,
    Service: v1::Service,
    Namespace: v1::Namespace,
    ServiceAccount: v1::ServiceAccount,
    EndpointSlice: discovery::EndpointSlice,
    Node: v1::Node,
    ServiceCidr: networking::ServiceCIDR,
}

/// An object of a kind that is only known by name at run time. Complete, except for its managed fields.
#[derive(Clone, Debug)]
pub struct Custom {
    /// Standard metadata: name, labels and so on.
    pub metadata: ObjectMeta,
    /// The whole object.
    pub content: Value,
}

impl<'de> Deserialize<'de> for Custom {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let mut content = Value::deserialize(deserializer)?;
        if let Some(Value::Object(metadata)) = content.get_mut("metadata") {
            metadata.remove("managedFields");
        }
        let metadata = metadata(&content["metadata"]).map_err(D::Error::custom)?;
        Ok(Self { metadata, content })
    }
}

impl Resource for Custom {
    type DynamicType = ApiResource;
    type Scope = DynamicResourceScope;

    fn kind(kind: &ApiResource) -> Cow<'_, str> {
        kind.kind.as_str().into()
    }

    fn group(kind: &ApiResource) -> Cow<'_, str> {
        kind.group.as_str().into()
    }

    fn version(kind: &ApiResource) -> Cow<'_, str> {
        kind.version.as_str().into()
    }

    fn plural(kind: &ApiResource) -> Cow<'_, str> {
        kind.plural.as_str().into()
    }

    fn meta(&self) -> &ObjectMeta {
        &self.metadata
    }

    fn meta_mut(&mut self) -> &mut ObjectMeta {
        &mut self.metadata
    }
}

/// Deserializes `null` as the default value, because some clients write `null` for an empty field.
fn or_default<'de, D, T>(deserializer: D) -> Result<T, D::Error>
where
    D: Deserializer<'de>,
    T: Default + Deserialize<'de>,
{
    Ok(Option::deserialize(deserializer)?.unwrap_or_default())
}

/// Deserializes metadata without owners, finalizers and managed fields, which make up most of it.
fn metadata<'de, D: Deserializer<'de>>(deserializer: D) -> Result<ObjectMeta, D::Error> {
    #[derive(Default, Deserialize)]
    #[serde(rename_all = "camelCase")]
    struct Metadata {
        name: Option<String>,
        namespace: Option<String>,
        uid: Option<String>,
        resource_version: Option<String>,
        labels: Option<BTreeMap<String, String>>,
        annotations: Option<BTreeMap<String, String>>,
        deletion_timestamp: Option<Time>,
    }
    let read = Option::<Metadata>::deserialize(deserializer)?.unwrap_or_default();
    Ok(ObjectMeta {
        name: read.name,
        namespace: read.namespace,
        uid: read.uid,
        resource_version: read.resource_version,
        labels: read.labels,
        annotations: read.annotations,
        deletion_timestamp: read.deletion_timestamp,
        ..ObjectMeta::default()
    })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn what_is_not_used_is_not_kept_and_null_is_nothing() {
        let pod: Pod = serde_json::from_value(json!({
            "apiVersion": "v1", "kind": "Pod",
            "metadata": {
                "name": "web", "creationTimestamp": null, "deletionTimestamp": "2026-01-01T00:00:00Z",
                "managedFields": [{"manager": "kubelet", "fieldsV1": {"f:status": {}}}],
            },
            "spec": {"nodeName": null, "containers": [{"name": "c", "ports": null, "image": "x"}]},
            "status": null,
        }))
        .unwrap();
        assert_eq!(pod.metadata.managed_fields, None);
        assert!(pod.metadata.deletion_timestamp.is_some());
        assert_eq!(pod.spec.containers.len(), 1);
        assert_eq!(pod.status.phase, None);
        assert_eq!(
            Pod::url_path(&(), Some("shop")),
            "/api/v1/namespaces/shop/pods"
        );
        assert_eq!(
            EndpointSlice::url_path(&(), None),
            "/apis/discovery.k8s.io/v1/endpointslices"
        );
        assert_eq!(
            ServiceCidr::url_path(&(), None),
            "/apis/networking.k8s.io/v1/servicecidrs"
        );
    }
}

//! Objects of the cluster's API, and of each no more than the mesh uses: the rest is skipped as it is read, never kept.

use std::{borrow::Cow, collections::BTreeMap};

use k8s_openapi::{
    api::{core::v1, discovery::v1 as discovery},
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
    /// Names, labels and the like.
    #[serde(default, deserialize_with = "metadata")]
    pub metadata: ObjectMeta,
    /// What is wanted.
    #[serde(default, deserialize_with = "or_default")]
    pub spec: PodSpec,
    /// What is.
    #[serde(default, deserialize_with = "or_default")]
    pub status: PodStatus,
}

/// What a pod is to be.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PodSpec {
    /// The node that it is bound to.
    pub node_name: Option<String>,
    /// Its service account.
    pub service_account_name: Option<String>,
    /// Whether it has no network namespace of its own.
    pub host_network: Option<bool>,
    /// Its containers.
    #[serde(default, deserialize_with = "or_default")]
    pub containers: Vec<Container>,
    /// Those that run before or beside them.
    #[serde(default, deserialize_with = "or_default")]
    pub init_containers: Vec<Container>,
}

/// A container of a pod.
#[derive(Clone, Debug, Default, Deserialize)]
pub struct Container {
    /// Ports that it names.
    #[serde(default, deserialize_with = "or_default")]
    pub ports: Vec<ContainerPort>,
}

/// A port of a container.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ContainerPort {
    /// By which services may name it.
    pub name: Option<String>,
    /// Number.
    pub container_port: i32,
    /// `TCP` where it does not say.
    pub protocol: Option<String>,
}

/// How a pod is.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PodStatus {
    /// `Pending`, `Running`, `Succeeded`, `Failed`, `Unknown`.
    pub phase: Option<String>,
    /// Its first address.
    #[serde(rename = "podIP")]
    pub pod_ip: Option<String>,
    /// All its addresses.
    #[serde(rename = "podIPs", default, deserialize_with = "or_default")]
    pub pod_ips: Vec<PodIp>,
    /// Of which `Ready` is one.
    #[serde(default, deserialize_with = "or_default")]
    pub conditions: Vec<Condition>,
}

/// An address of a pod.
#[derive(Clone, Debug, Default, Deserialize)]
pub struct PodIp {
    /// As text.
    #[serde(default)]
    pub ip: String,
}

/// Something that is so, or is not.
#[derive(Clone, Debug, Deserialize)]
pub struct Condition {
    /// Which one.
    #[serde(rename = "type")]
    pub type_: String,
    /// `True`, `False` or `Unknown`.
    pub status: String,
}

/// A service.
#[derive(Clone, Debug, Default, Deserialize)]
pub struct Service {
    /// Names, labels and the like.
    #[serde(default, deserialize_with = "metadata")]
    pub metadata: ObjectMeta,
    /// What is wanted.
    #[serde(default, deserialize_with = "or_default")]
    pub spec: ServiceSpec,
}

/// What a service is to be.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ServiceSpec {
    /// `ClusterIP`, `ExternalName` and others.
    #[serde(rename = "type")]
    pub type_: Option<String>,
    /// Its first virtual address, or `None`.
    #[serde(rename = "clusterIP")]
    pub cluster_ip: Option<String>,
    /// All its virtual addresses.
    #[serde(rename = "clusterIPs", default, deserialize_with = "or_default")]
    pub cluster_ips: Vec<String>,
    /// Labels of its pods.
    #[serde(default, deserialize_with = "or_default")]
    pub selector: BTreeMap<String, String>,
    /// Ports.
    #[serde(default, deserialize_with = "or_default")]
    pub ports: Vec<ServicePort>,
    /// Whether pods count that are not ready.
    pub publish_not_ready_addresses: Option<bool>,
    /// `ClientIP`: a client always gets the same pod.
    pub session_affinity: Option<String>,
    /// `Local`: only pods of the client's node count.
    pub internal_traffic_policy: Option<String>,
}

/// A port of a service.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ServicePort {
    /// Name, by which endpoint slices know it.
    pub name: Option<String>,
    /// Port of the virtual address.
    pub port: i32,
    /// `TCP` where it does not say.
    pub protocol: Option<String>,
    /// Port of the pods; the same where it does not say.
    pub target_port: Option<IntOrString>,
}

/// A namespace.
#[derive(Clone, Debug, Default, Deserialize)]
pub struct Namespace {
    /// Names, labels and the like.
    #[serde(default, deserialize_with = "metadata")]
    pub metadata: ObjectMeta,
}

/// A service account.
#[derive(Clone, Debug, Default, Deserialize)]
pub struct ServiceAccount {
    /// Names, labels and the like.
    #[serde(default, deserialize_with = "metadata")]
    pub metadata: ObjectMeta,
}

/// Some of the endpoints of a service.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct EndpointSlice {
    /// Names, labels and the like.
    #[serde(default, deserialize_with = "metadata")]
    pub metadata: ObjectMeta,
    /// `IPv4`, `IPv6` or `FQDN`.
    #[serde(default)]
    pub address_type: String,
    /// Endpoints.
    #[serde(default, deserialize_with = "or_default")]
    pub endpoints: Vec<SliceEndpoint>,
    /// Ports that all of them have.
    #[serde(default, deserialize_with = "or_default")]
    pub ports: Vec<SlicePort>,
}

/// An endpoint in a slice.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct SliceEndpoint {
    /// As text. The first one counts; what others mean is not said.
    #[serde(default, deserialize_with = "or_default")]
    pub addresses: Vec<String>,
    /// The object that it is.
    pub target_ref: Option<TargetRef>,
    /// The node that it is on.
    pub node_name: Option<String>,
    /// Whether it may be used.
    #[serde(default, deserialize_with = "or_default")]
    pub conditions: SliceConditions,
}

/// Whether an endpoint may be used.
#[derive(Clone, Debug, Default, Deserialize)]
pub struct SliceConditions {
    /// Whether it takes connections. What is not said is taken for true.
    pub ready: Option<bool>,
    /// Whether it would, were it not going. What is not said is taken for the same as `ready`.
    pub serving: Option<bool>,
    /// Whether it is going. What is not said is taken for false.
    pub terminating: Option<bool>,
}

/// The object that an endpoint is.
#[derive(Clone, Debug, Default, Deserialize)]
pub struct TargetRef {
    /// `Pod`, for one.
    pub kind: Option<String>,
    /// Its namespace.
    pub namespace: Option<String>,
    /// Its name.
    pub name: Option<String>,
}

/// A port of a slice's endpoints.
#[derive(Clone, Debug, Default, Deserialize)]
pub struct SlicePort {
    /// The name of the service's port.
    pub name: Option<String>,
    /// Number; none stands for all ports.
    pub port: Option<i32>,
    /// `TCP` where it does not say.
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
}

/// An object of a kind that this program knows only by name, whole but for its managed fields.
#[derive(Clone, Debug)]
pub struct Custom {
    /// Names, labels and the like.
    pub metadata: ObjectMeta,
    /// All of it.
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

/// What stands for nothing is written as `null` by some.
fn or_default<'de, D, T>(deserializer: D) -> Result<T, D::Error>
where
    D: Deserializer<'de>,
    T: Default + Deserialize<'de>,
{
    Ok(Option::deserialize(deserializer)?.unwrap_or_default())
}

/// Metadata without owners, finalizers and managed fields, which are most of it.
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
    }
}

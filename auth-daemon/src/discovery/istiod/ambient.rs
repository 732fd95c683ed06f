//! Which pods are in the mesh by Istio's labels
//! (<https://istio.io/latest/docs/ambient/usage/add-workloads/#ambient-labels>).

use std::sync::Arc;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;

use crate::discovery::manifest::{MESH_LABEL, Object};
use auth_kubernetes::objects;
use auth_mesh::Membership;

/// Label of a namespace or pod: `ambient` puts pods into the mesh, `none` on a pod keeps it out.
const DATAPLANE_MODE: &str = "istio.io/dataplane-mode";
/// Annotation of a pod that has a sidecar, which takes its connections itself.
const SIDECAR_STATUS: &str = "sidecar.istio.io/status";

/// Reads the membership that a pod sets for itself. A pod with a sidecar is never in the mesh.
pub(super) fn of_pod(pod: &objects::Pod) -> Option<Membership> {
    let annotations = pod.metadata.annotations.as_ref();
    if annotations.is_some_and(|all| all.contains_key(SIDECAR_STATUS)) {
        return Some(Membership::Disabled);
    }
    membership(&pod.metadata)
}

/// Reads the membership that a namespace sets for its pods.
pub(super) fn of_namespace(namespace: &objects::Namespace) -> Option<Membership> {
    membership(&namespace.metadata)
}

/// Removes the label by which discovery from the API server alone knows the mesh's pods: here, istiod's labels count.
pub(super) fn forget_other_label(metadata: &mut ObjectMeta) {
    let maps = [&mut metadata.labels, &mut metadata.annotations];
    for values in maps.into_iter().flatten() {
        values.remove(MESH_LABEL);
    }
}

/// Gives a pod this membership, unless it cannot be in the mesh.
pub(super) fn with(mut object: Object, membership: Option<Membership>) -> Object {
    if let Object::Pod(pod) = &mut object
        && pod.membership != Some(Membership::Disabled)
    {
        Arc::make_mut(pod).membership = membership;
    }
    object
}

/// Other values have no meaning in Istio, and set nothing.
fn membership(metadata: &ObjectMeta) -> Option<Membership> {
    match metadata.labels.as_ref()?.get(DATAPLANE_MODE)?.as_str() {
        "ambient" => Some(Membership::Enabled),
        "none" => Some(Membership::Disabled),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn pod(labels: Value, annotations: Value) -> objects::Pod {
        let metadata = json!({"name": "web", "labels": labels, "annotations": annotations});
        serde_json::from_value(json!({"metadata": metadata})).unwrap()
    }

    #[test]
    fn pods_are_in_the_mesh_by_istios_labels() {
        for (value, expected) in [
            ("ambient", Some(Membership::Enabled)),
            ("none", Some(Membership::Disabled)),
            ("Ambient", None),
            ("", None),
        ] {
            let labels = json!({DATAPLANE_MODE: value});
            assert_eq!(of_pod(&pod(labels.clone(), json!({}))), expected, "{value}");
            let metadata = json!({"metadata": {"name": "shop", "labels": labels}});
            let namespace = serde_json::from_value(metadata).unwrap();
            assert_eq!(of_namespace(&namespace), expected, "{value}");
        }
        assert_eq!(of_pod(&pod(Value::Null, Value::Null)), None);
    }

    #[test]
    fn a_pod_with_a_sidecar_is_outside() {
        let labels = json!({DATAPLANE_MODE: "ambient"});
        let with_sidecar = pod(labels, json!({SIDECAR_STATUS: "{}"}));
        assert_eq!(of_pod(&with_sidecar), Some(Membership::Disabled));
    }

    #[test]
    fn the_label_of_another_source_counts_for_nothing() {
        let mut labelled = pod(json!({MESH_LABEL: "enabled"}), json!({MESH_LABEL: "x"}));
        forget_other_label(&mut labelled.metadata);
        assert_eq!(labelled.metadata, pod(json!({}), json!({})).metadata);
    }
}

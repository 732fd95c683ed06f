//! What users see of the mesh: in a terminal, in a real browser, and in a real Prometheus.

#[path = "../common/mod.rs"]
mod common;

mod alerts;
mod chromium;
mod dashboard;
mod istio_metrics;
mod large;
mod live;
mod made_up;
mod observe;
mod seen;
mod top;

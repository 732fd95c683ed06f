//! The messages of NRI, with only the fields that are used. Their numbers are those of `pkg/api/api.proto`.

/// Plugin → runtime.
#[derive(Clone, PartialEq, prost::Message)]
pub(crate) struct RegisterPlugin {
    #[prost(string, tag = "1")]
    pub(crate) name: String,
    /// Plugins are called in the order of their indices: two digits.
    #[prost(string, tag = "2")]
    pub(crate) index: String,
}

/// Runtime → plugin: the first call after the registration.
#[derive(Clone, PartialEq, prost::Message)]
pub(crate) struct Configure {
    #[prost(string, tag = "2")]
    pub(crate) runtime_name: String,
    #[prost(string, tag = "3")]
    pub(crate) runtime_version: String,
    /// Milliseconds after which the runtime drops a plugin that has not answered; 0 if the runtime does not say.
    #[prost(int64, tag = "5")]
    pub(crate) request_timeout: i64,
}

#[derive(Clone, PartialEq, prost::Message)]
pub(crate) struct Configured {
    /// A bit for each [event](RUN_POD_SANDBOX), the first for event 1.
    #[prost(int32, tag = "2")]
    pub(crate) events: i32,
}

/// Runtime → plugin: what runs already, in as many messages as it takes.
#[derive(Clone, PartialEq, prost::Message)]
pub(crate) struct Synchronize {
    #[prost(bool, tag = "3")]
    pub(crate) more: bool,
}

#[derive(Clone, PartialEq, prost::Message)]
pub(crate) struct Synchronized {
    #[prost(bool, tag = "2")]
    pub(crate) more: bool,
}

/// Runtime → plugin: a pod is about to start. NRI 0.11 and later.
#[derive(Clone, PartialEq, prost::Message)]
pub(crate) struct RunPodSandbox {
    #[prost(message, optional, tag = "1")]
    pub(crate) pod: Option<PodSandbox>,
}

/// Runtime → plugin: what earlier versions send in place of [`RunPodSandbox`], and for other events.
#[derive(Clone, PartialEq, prost::Message)]
pub(crate) struct StateChange {
    #[prost(int32, tag = "1")]
    pub(crate) event: i32,
    #[prost(message, optional, tag = "2")]
    pub(crate) pod: Option<PodSandbox>,
}

#[derive(Clone, PartialEq, prost::Message)]
pub(crate) struct PodSandbox {
    #[prost(string, tag = "2")]
    pub(crate) name: String,
    #[prost(string, tag = "3")]
    pub(crate) uid: String,
    #[prost(string, tag = "4")]
    pub(crate) namespace: String,
}

/// The event of a pod that is about to start.
pub(crate) const RUN_POD_SANDBOX: i32 = 1;

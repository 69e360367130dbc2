//! Errors as metav1.Status: one shape for the registry, the gRPC services, REST and the CLI.
//!
//! A [`Status`] crosses gRPC as a `tonic::Status` whose details carry its JSON, so nothing is lost
//! on the way; the gRPC code is chosen so that a client without Kubernetes knowledge also reacts
//! well. Message texts are those of Kubernetes' `apimachinery/pkg/api/errors`.
//!
//! A gRPC status travels in HTTP/2 trailers, which peers bound to 16 KiB: a status with very many
//! causes therefore loses the last ones (and says so), never the first.

use crate::field::FieldError;
use crate::kinds::Kind;
use serde::{Deserialize, Serialize};
use std::fmt;

/// The longest details JSON that is put into trailers, in bytes (base64 makes a third more of it).
const DETAILS_BYTES_MAX: usize = 7 * 1024;
/// The longest gRPC message, in bytes (percent-encoding can triple it).
const MESSAGE_BYTES_MAX: usize = 1024;

/// Why a request failed, in one machine-readable word.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Reason {
    /// The request itself is malformed.
    BadRequest,
    /// No usable client identity.
    Unauthorized,
    /// The identity may not do this.
    Forbidden,
    /// There is no such object.
    NotFound,
    /// An object of this name exists.
    AlreadyExists,
    /// The object changed meanwhile (resourceVersion or uid differs).
    Conflict,
    /// The object breaks a rule; `details.causes` names the fields.
    Invalid,
    /// The revision asked for is compacted away: list again.
    Expired,
    /// The object is larger than the server takes.
    RequestEntityTooLarge,
    /// The kind or verb is not served.
    MethodNotAllowed,
    /// Too many requests; try again later.
    TooManyRequests,
    /// It did not happen in time.
    Timeout,
    /// A part that is needed cannot be reached; try again.
    ServiceUnavailable,
    /// A defect of the server.
    InternalError,
    /// Anything else (also words that this version does not know).
    #[serde(other)]
    Unknown,
}

impl Reason {
    /// The word as it is printed, e.g. `NotFound` in `Error from server (NotFound): …`.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::BadRequest => "BadRequest",
            Self::Unauthorized => "Unauthorized",
            Self::Forbidden => "Forbidden",
            Self::NotFound => "NotFound",
            Self::AlreadyExists => "AlreadyExists",
            Self::Conflict => "Conflict",
            Self::Invalid => "Invalid",
            Self::Expired => "Expired",
            Self::RequestEntityTooLarge => "RequestEntityTooLarge",
            Self::MethodNotAllowed => "MethodNotAllowed",
            Self::TooManyRequests => "TooManyRequests",
            Self::Timeout => "Timeout",
            Self::ServiceUnavailable => "ServiceUnavailable",
            Self::InternalError => "InternalError",
            Self::Unknown => "Unknown",
        }
    }

    /// The HTTP status code that belongs to it.
    #[must_use]
    pub fn http_code(self) -> u16 {
        match self {
            Self::BadRequest => 400,
            Self::Unauthorized => 401,
            Self::Forbidden => 403,
            Self::NotFound => 404,
            Self::MethodNotAllowed => 405,
            Self::AlreadyExists | Self::Conflict => 409,
            Self::Expired => 410,
            Self::RequestEntityTooLarge => 413,
            Self::Invalid => 422,
            Self::TooManyRequests => 429,
            Self::InternalError | Self::Unknown => 500,
            Self::ServiceUnavailable => 503,
            Self::Timeout => 504,
        }
    }

    fn grpc_code(self) -> tonic::Code {
        match self {
            Self::BadRequest | Self::Invalid => tonic::Code::InvalidArgument,
            Self::Unauthorized => tonic::Code::Unauthenticated,
            Self::Forbidden => tonic::Code::PermissionDenied,
            Self::NotFound => tonic::Code::NotFound,
            Self::AlreadyExists => tonic::Code::AlreadyExists,
            Self::Conflict => tonic::Code::Aborted,
            Self::Expired => tonic::Code::OutOfRange,
            Self::MethodNotAllowed => tonic::Code::Unimplemented,
            Self::RequestEntityTooLarge | Self::TooManyRequests => tonic::Code::ResourceExhausted,
            Self::Timeout => tonic::Code::DeadlineExceeded,
            Self::ServiceUnavailable => tonic::Code::Unavailable,
            Self::InternalError => tonic::Code::Internal,
            Self::Unknown => tonic::Code::Unknown,
        }
    }

    fn of_grpc_code(code: tonic::Code) -> Self {
        match code {
            tonic::Code::InvalidArgument | tonic::Code::FailedPrecondition => Self::BadRequest,
            tonic::Code::Unauthenticated => Self::Unauthorized,
            tonic::Code::PermissionDenied => Self::Forbidden,
            tonic::Code::NotFound => Self::NotFound,
            tonic::Code::AlreadyExists => Self::AlreadyExists,
            tonic::Code::Aborted => Self::Conflict,
            tonic::Code::OutOfRange => Self::Expired,
            tonic::Code::Unimplemented => Self::MethodNotAllowed,
            tonic::Code::ResourceExhausted => Self::TooManyRequests,
            tonic::Code::DeadlineExceeded | tonic::Code::Cancelled => Self::Timeout,
            tonic::Code::Unavailable => Self::ServiceUnavailable,
            tonic::Code::Internal | tonic::Code::DataLoss => Self::InternalError,
            tonic::Code::Ok | tonic::Code::Unknown => Self::Unknown,
        }
    }
}

/// One field's part in a failure.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Cause {
    /// Machine-readable, e.g. `FieldValueInvalid`.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub reason: String,
    /// For people, without the path.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub message: String,
    /// The path, e.g. `spec.replicas`.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub field: String,
}

/// Which object failed, and where.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct Details {
    /// The object's name.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub name: String,
    /// API group; empty for core.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub group: String,
    /// Plural resource; for `Invalid` the kind, as in Kubernetes.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub kind: String,
    /// The object's uid, when a uid was part of the request.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub uid: String,
    /// The fields concerned.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub causes: Vec<Cause>,
    /// Seconds after which a retry makes sense; 0: not said.
    #[serde(skip_serializing_if = "is_zero")]
    pub retry_after_seconds: u32,
}

#[expect(
    clippy::trivially_copy_pass_by_ref,
    reason = "serde's skip_serializing_if passes &T"
)]
fn is_zero(n: &u32) -> bool {
    *n == 0
}

/// A failed request, shaped as metav1.Status. Serialises to exactly that JSON.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "Wire", into = "Wire")]
pub struct Status {
    /// HTTP status code.
    pub code: u16,
    /// Machine-readable reason.
    pub reason: Reason,
    /// For people.
    pub message: String,
    /// Which object and fields; empty when the failure concerns none. Boxed: errors are moved often.
    pub details: Box<Details>,
}

/// The JSON of metav1.Status, envelope included.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Wire {
    #[serde(default)]
    kind: String,
    #[serde(default)]
    api_version: String,
    #[serde(default)]
    metadata: serde_json::Map<String, serde_json::Value>,
    #[serde(default)]
    status: String,
    #[serde(default)]
    message: String,
    #[serde(default = "unknown")]
    reason: Reason,
    #[serde(default, skip_serializing_if = "is_empty")]
    details: Box<Details>,
    #[serde(default)]
    code: u16,
}

fn unknown() -> Reason {
    Reason::Unknown
}

fn is_empty(details: &Details) -> bool {
    *details == Details::default()
}

impl From<Wire> for Status {
    fn from(wire: Wire) -> Self {
        let code = if wire.code == 0 {
            wire.reason.http_code()
        } else {
            wire.code
        };
        Self {
            code,
            reason: wire.reason,
            message: wire.message,
            details: wire.details,
        }
    }
}

impl From<Status> for Wire {
    fn from(status: Status) -> Self {
        Self {
            kind: "Status".to_owned(),
            api_version: "v1".to_owned(),
            metadata: serde_json::Map::new(),
            status: "Failure".to_owned(),
            message: status.message,
            reason: status.reason,
            details: status.details,
            code: status.code,
        }
    }
}

impl Status {
    /// A failure with this reason and text that concerns no single object.
    #[must_use]
    pub fn new(reason: Reason, message: impl Into<String>) -> Self {
        Self {
            code: reason.http_code(),
            reason,
            message: message.into(),
            details: Box::default(),
        }
    }

    fn about(reason: Reason, kind: &Kind, name: &str, message: String) -> Self {
        let details = Details {
            name: name.to_owned(),
            group: kind.group.to_owned(),
            kind: kind.plural.to_owned(),
            ..Details::default()
        };
        Self {
            code: reason.http_code(),
            reason,
            message,
            details: Box::new(details),
        }
    }

    /// `pods "x" not found`
    #[must_use]
    pub fn not_found(kind: &Kind, name: &str) -> Self {
        let message = format!("{} {name:?} not found", kind.qualified_resource());
        Self::about(Reason::NotFound, kind, name, message)
    }

    /// `pods "x" already exists`
    #[must_use]
    pub fn already_exists(kind: &Kind, name: &str) -> Self {
        let message = format!("{} {name:?} already exists", kind.qualified_resource());
        Self::about(Reason::AlreadyExists, kind, name, message)
    }

    /// The object changed since it was read (or is another one of the same name): `detail` says
    /// which and what to do.
    #[must_use]
    pub fn conflict(kind: &Kind, name: &str, detail: &str) -> Self {
        let resource = kind.qualified_resource();
        let message = format!("Operation cannot be fulfilled on {resource} {name:?}: {detail}");
        Self::about(Reason::Conflict, kind, name, message)
    }

    /// The usual conflict: a write based on an old resourceVersion.
    #[must_use]
    pub fn modified(kind: &Kind, name: &str) -> Self {
        let detail = "the object has been modified; please apply your changes to the latest \
                      version and try again";
        Self::conflict(kind, name, detail)
    }

    /// The object breaks rules: `Deployment.apps "web" is invalid: spec.replicas: …`.
    #[must_use]
    pub fn invalid(kind: &Kind, name: &str, errors: &[FieldError]) -> Self {
        let texts: Vec<String> = errors.iter().map(ToString::to_string).collect();
        let text = if let [one] = texts.as_slice() {
            one.clone()
        } else {
            format!("[{}]", texts.join(", "))
        };
        let message = format!("{} {name:?} is invalid: {text}", kind.qualified_kind());
        let mut status = Self::about(Reason::Invalid, kind, name, message);
        kind.kind.clone_into(&mut status.details.kind);
        status.details.causes = errors
            .iter()
            .map(|e| Cause {
                reason: e.error_type.reason().to_owned(),
                message: e.body.clone(),
                field: e.field.clone(),
            })
            .collect();
        status
    }

    /// The identity may not do this to this object; `detail` says why.
    #[must_use]
    pub fn forbidden(kind: &Kind, name: &str, detail: &str) -> Self {
        let resource = kind.qualified_resource();
        let message = if name.is_empty() {
            format!("{resource} is forbidden: {detail}")
        } else {
            format!("{resource} {name:?} is forbidden: {detail}")
        };
        Self::about(Reason::Forbidden, kind, name, message)
    }

    /// The request itself is malformed.
    #[must_use]
    pub fn bad_request(message: impl Into<String>) -> Self {
        Self::new(Reason::BadRequest, message)
    }

    /// No usable identity.
    #[must_use]
    pub fn unauthorized(message: impl Into<String>) -> Self {
        Self::new(Reason::Unauthorized, message)
    }

    /// The revision asked for is compacted away: list again and watch from there.
    #[must_use]
    pub fn gone(message: impl Into<String>) -> Self {
        Self::new(Reason::Expired, message)
    }

    /// A defect of the server, or a disk that failed.
    #[must_use]
    pub fn internal(message: impl Into<String>) -> Self {
        Self::new(Reason::InternalError, message)
    }

    /// Something needed cannot be reached now.
    #[must_use]
    pub fn unavailable(message: impl Into<String>) -> Self {
        Self::new(Reason::ServiceUnavailable, message)
    }

    /// It did not happen in time.
    #[must_use]
    pub fn timeout(message: impl Into<String>) -> Self {
        Self::new(Reason::Timeout, message)
    }

    /// The server does not serve this kind or verb.
    #[must_use]
    pub fn not_served(message: impl Into<String>) -> Self {
        Self::new(Reason::MethodNotAllowed, message)
    }

    /// Whether the same request may succeed later without a change by the caller.
    #[must_use]
    pub fn is_retryable(&self) -> bool {
        matches!(
            self.reason,
            Reason::ServiceUnavailable | Reason::Timeout | Reason::TooManyRequests
        )
    }

    /// This status as JSON that fits into trailers: the last causes go first, then the message's
    /// end.
    fn bounded_json(&self) -> Vec<u8> {
        let mut status = self.clone();
        loop {
            let json = serde_json::to_vec(&status).unwrap_or_default();
            if json.len() <= DETAILS_BYTES_MAX {
                return json;
            }
            let keep = status.details.causes.len() / 2;
            if keep > 0 {
                status.details.causes.truncate(keep);
            } else {
                status.details.causes.clear();
            }
            let half = status.message.len().min(DETAILS_BYTES_MAX) / 2;
            if status.message.len() > MESSAGE_BYTES_MAX {
                status.message = cut(&status.message, half.max(MESSAGE_BYTES_MAX / 2));
            } else if status.details.causes.is_empty() {
                // Only a name beyond any valid length can still be too large.
                *status.details = Details::default();
            }
        }
    }
}

fn cut(text: &str, max_bytes: usize) -> String {
    if text.len() <= max_bytes {
        return text.to_owned();
    }
    format!(
        "{}... (shortened)",
        &text[..text.floor_char_boundary(max_bytes)]
    )
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Status {}

impl From<Status> for tonic::Status {
    fn from(status: Status) -> Self {
        let message = cut(&status.message, MESSAGE_BYTES_MAX);
        Self::with_details(
            status.reason.grpc_code(),
            message,
            status.bounded_json().into(),
        )
    }
}

impl From<tonic::Status> for Status {
    fn from(status: tonic::Status) -> Self {
        // Details of another origin (a proxy, say) are not ours: fall back to code and message.
        if let Ok(ours) = serde_json::from_slice::<Self>(status.details())
            && !ours.message.is_empty()
        {
            return ours;
        }
        Self::new(Reason::of_grpc_code(status.code()), status.message())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::field::Path;
    use crate::kinds::resolve;
    use proptest::prelude::*;

    #[test]
    fn messages_read_like_kubernetes() {
        let pods = resolve("pods").unwrap();
        let deployments = resolve("deploy").unwrap();
        assert_eq!(Status::not_found(pods, "x").message, "pods \"x\" not found");
        assert_eq!(
            Status::already_exists(deployments, "web").message,
            "deployments.apps \"web\" already exists"
        );
        let replicas = Path::new("spec").child("replicas");
        let error = FieldError::invalid(&replicas, -1, "must be greater than or equal to 0");
        let status = Status::invalid(deployments, "web", &[error]);
        assert_eq!(
            status.message,
            "Deployment.apps \"web\" is invalid: spec.replicas: Invalid value: -1: must be \
             greater than or equal to 0"
        );
        assert_eq!(status.code, 422);
        assert_eq!(status.details.causes[0].field, "spec.replicas");
        assert_eq!(status.details.causes[0].reason, "FieldValueInvalid");
    }

    #[test]
    fn json_is_a_kubernetes_status() {
        let status = Status::not_found(resolve("deploy").unwrap(), "web");
        assert_eq!(
            serde_json::to_value(&status).unwrap(),
            serde_json::json!({
                "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure",
                "message": "deployments.apps \"web\" not found", "reason": "NotFound",
                "details": {"name": "web", "group": "apps", "kind": "deployments"}, "code": 404
            })
        );
    }

    #[test]
    fn a_foreign_grpc_status_keeps_its_meaning() {
        let status = Status::from(tonic::Status::unavailable("try later"));
        assert_eq!(status.reason, Reason::ServiceUnavailable);
        assert!(status.is_retryable());
        assert_eq!(status.message, "try later");
    }

    #[test]
    fn thousands_of_errors_fit_into_trailers() {
        let errors: Vec<FieldError> = (0..5_000)
            .map(|i| FieldError::required(&Path::new("spec").child("x").index(i), "é"))
            .collect();
        let grpc = tonic::Status::from(Status::invalid(resolve("po").unwrap(), "p", &errors));
        assert!(grpc.details().len() <= DETAILS_BYTES_MAX);
        let back = Status::from(grpc);
        assert_eq!(back.reason, Reason::Invalid);
        assert_eq!(back.details.causes[0].field, "spec.x[0]");
        assert!(back.message.contains("shortened"));
    }

    proptest! {
        #[test]
        fn nothing_is_lost_on_the_wire(
            name in "[a-z]{0,20}", message in ".{1,80}", field in "[a-z.]{0,20}", which in 0..4u8,
        ) {
            let pods = resolve("pods").unwrap();
            let status = match which {
                0 => Status::not_found(pods, &name),
                1 => Status::conflict(pods, &name, &message),
                2 => Status::invalid(pods, &name, &[FieldError::required(&Path::new(&field), "")]),
                _ => Status::bad_request(message),
            };
            prop_assert_eq!(Status::from(tonic::Status::from(status.clone())), status);
        }
    }
}

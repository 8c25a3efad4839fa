variable "bucket" {
  description = "Name of the artifact store's bucket: publish.artifact_store is s3://BUCKET, or s3://BUCKET/PREFIX."
  type        = string
}

variable "prefix" {
  description = "Key prefix of the store, without slashes at its ends; empty for the whole bucket."
  type        = string
  default     = ""
}

variable "trusted_principals" {
  description = "ARNs that may assume each role, by role: reader, candidate, promoter, collector. promoter is required."
  type        = map(list(string))

  validation {
    condition     = contains(keys(var.trusted_principals), "promoter") && length(setsubtract(keys(var.trusted_principals), ["reader", "candidate", "promoter", "collector"])) == 0
    error_message = "Set at least promoter; the roles are reader, candidate, promoter and collector."
  }
}

variable "kms_key_arn" {
  description = "KMS key that encrypts the objects; null encrypts with S3's own keys (AES-256). Set publish.sse_kms_key_id to the same."
  type        = string
  default     = null
}

variable "noncurrent_days" {
  description = "Days for which a deleted object can be restored."
  type        = number
  default     = 90
}

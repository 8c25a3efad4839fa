output "artifact_store" {
  description = "The value of publish.artifact_store."
  value       = var.prefix == "" ? "s3://${var.bucket}" : "s3://${var.bucket}/${var.prefix}"
}

output "roles" {
  description = "ARN of each role; name one in an AWS profile, or give it to the machine."
  value       = { for name, role in aws_iam_role.role : name => role.arn }
}
